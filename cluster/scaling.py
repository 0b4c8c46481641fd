# SPDX-License-Identifier: Apache-2.0
"""Scaling: how many shards and workers are wanted, and which of them leave.

    shards     those that leave have nothing new, are drained, and are told to leave once no record names them; of the others as
               many as are wanted may have blocks, and what is left over waits as a spare
    workers    those that leave finish the splits that they have, and are leased no other

Invariant: what is wanted, and who leaves, is on disk before anybody is told; who was told to leave is not asked to stay. The
coordinator's lock covers it.
"""

import logging
from typing import TYPE_CHECKING, Any

from oarlock.client.autoscale import MOST_MEMBERS
from oarlock.client.job import GATHERING, OVER, STOPPING, TRAINING, JobSpec, check_replicas
from oarlock.cluster.members import Member, Members
from oarlock.cluster.record import Records
from oarlock.cluster.store import Store
from oarlock.proto.errors import InvalidArgument

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator

logger = logging.getLogger(__name__)

FACT = "scale"
# How long a shard that came has no blocks while others that are wanted, too, are not there yet.
GATHER_SECONDS = 5.0


def leaving(alive: list[tuple[int, int]], already: set[int], wanted: int) -> set[int]:
    """Return those of ``alive`` (id, incarnation) that leave, so that ``wanted`` stay: who leaves already, then high ids."""
    order = sorted(alive, key=lambda each: (each[1] in already, each[0]))
    return {incarnation for _, incarnation in order[wanted:]}


class Scaling:
    """``servers`` and ``workers`` are wanted. ``leaves``: incarnations of shards and workers that are to leave."""

    def __init__(self, spec: JobSpec, members: Members, records: Records) -> None:
        self._spec = spec
        self._members = members
        self._records = records
        self.servers, self.workers = spec.servers, spec.workers
        self.leaves: set[int] = set()
        # Whether some were to leave in the run before, of which nobody has been told in this one.
        self._unsettled = False

    def take_up(self, store: Store) -> None:
        """Load what was recorded."""
        found = store.fact(FACT)
        if found is not None:
            self.servers, self.workers = found["servers"], found["workers"]
            self.leaves = set(found["leaves"])
            self._unsettled = found.get("unsettled", False)

    def ask(self, store: Store, servers: int, workers: int, phase: str) -> str:
        """Record within a transaction what is wanted from now on, 0: as it is; return what follows, for people."""
        # Of a role whose number is not asked about nobody is told to leave: some that count as alive may be dead.
        of_servers, of_workers = servers > 0, workers > 0
        servers, workers = servers or self.servers, workers or self.workers
        for name, value in (("servers", servers), ("workers", workers)):
            if not 1 <= value <= MOST_MEMBERS:
                raise InvalidArgument(f"{name} = {value}: give an integer from 1 to {MOST_MEMBERS}")
        if phase in (STOPPING, *OVER):
            raise InvalidArgument(f"job {self._spec.name} is {phase}: its processes leave anyway")
        if phase == GATHERING and servers != self.servers:
            raise InvalidArgument(
                f"job {self._spec.name} still gathers its {self.servers} shards: ask again once it trains"
            )
        check_replicas(self._spec.replicas, servers)
        shards, others = self._members.alive("shard"), self._members.alive("worker")
        part = [m for m in shards if self.takes_part(m)]
        leaves = self.leaves & {m.incarnation for m in (*shards, *others)}
        if of_servers:
            leaves -= {m.incarnation for m in part}
            leaves |= leaving([(m.id, m.incarnation) for m in part], self.leaves, servers)
            # Those that wait are needed first where more are wanted, and go where fewer are; who was told to go may be gone.
            spares = [m for m in shards if not self.takes_part(m)]
            room = max(0, servers - len(part)) + sum(m.incarnation in self.leaves for m in spares)
            leaves |= leaving([(m.id, m.incarnation) for m in spares], set(), room)
        if of_workers:
            leaves -= {m.incarnation for m in others}
            leaves |= leaving([(m.id, m.incarnation) for m in others], self.leaves, workers)
        self.servers, self.workers, self.leaves = servers, workers, leaves
        self._unsettled = False
        self._record(store)
        return self._said(shards, others)

    def _said(self, shards: list[Member], workers: list[Member]) -> str:
        said = []
        for name, members, wanted in (("server", shards, self.servers), ("worker", workers, self.workers)):
            go = [m.id for m in members if m.incarnation in self.leaves]
            more = wanted - (len(members) - len(go))
            if go:
                said.append(f"{name} {', '.join(map(str, sorted(go)))} to leave")
            if more > 0:
                said.append(f"{more} more {name}{'s' if more > 1 else ''} to come")
        return "; ".join(said) or "nothing changes"

    def go_back(self, store: Store, *, stays: bool) -> None:
        """A new run begins, and everybody joins anew: nobody leaves, and as many are wanted as the job says now.

        ``stays``: as many as were wanted before; those that were to leave come as well, and are told again (``settle``).
        """
        if not stays:
            self.servers, self.workers = self._spec.servers, self._spec.workers
        self._unsettled = stays and bool(self.leaves or self._unsettled)
        self.leaves = set()
        self._record(store)

    def settle(self, store: Store) -> None:
        """The job trains: those leave who are too many, if some were to leave in the run before."""
        if self._unsettled:
            with store:
                self.ask(store, self.servers, self.workers, TRAINING)

    def _record(self, store: Store) -> None:
        told = {"servers": self.servers, "workers": self.workers, "leaves": sorted(self.leaves)}
        store.set_fact(FACT, {**told, **({"unsettled": True} if self._unsettled else {})})

    def takes_part(self, member: Member) -> bool:
        """Whether a shard is one of those that records may name."""
        found = self._records.shards.get(member.id)
        return found is not None and found.incarnation == member.incarnation

    def usable(self) -> list[Member]:
        """Return the shards that may have blocks: as many as are wanted, those first that take part already."""
        stay = [m for m in self._members.alive("shard") if m.incarnation not in self.leaves]
        return sorted(stay, key=lambda m: (not self.takes_part(m), m.id))[: self.servers]

    @property
    def patience(self) -> float:
        """Return for how many seconds those that are there wait for others: what they got they would have to give to these."""
        return GATHER_SECONDS if len(self.usable()) < self.servers else 0.0

    def drained(self) -> list[int]:
        """Return the ids of shards that leave, take part still, and have nothing."""
        leave = [m for m in self._members.alive("shard") if m.incarnation in self.leaves and self.takes_part(m)]
        return [m.id for m in leave if not len(self._records.named(m.id))]

    def dismissed(self, member: Member) -> bool:
        """Whether a shard is to be told that nothing is left for it: it takes part no more."""
        return member.incarnation in self.leaves and not self.takes_part(member)

    def told(self) -> dict[str, Any]:
        """Return what people ask."""
        go = {
            role: [m.id for m in self._members.alive(role) if m.incarnation in self.leaves]
            for role in ("shard", "worker")
        }
        return {"servers": self.servers, "workers": self.workers, "leaving": go}


def scale(c: "Coordinator", servers: int, workers: int) -> str:
    """Want another number of shards or workers, as somebody asks, 0: as it is; return what follows, for people."""
    with c.lock:
        with c.store as store:
            said = rescale(c, store, servers, workers)
        c.autoscaling.asked()
        c.wake()
        return said


def rescale(c: "Coordinator", store: Store, servers: int, workers: int) -> str:
    """Want another number of shards or workers, 0: as it is, within a transaction; return what follows, for people."""
    said = c.scaling.ask(store, servers, workers, c.phase)
    c.copies.look(store)
    logger.info("event=scale servers=%d workers=%d", c.scaling.servers, c.scaling.workers)
    return said
