# SPDX-License-Identifier: Apache-2.0
"""Rollback: one table goes back to a checkpoint in the midst of training, everything else goes on.

    asked      somebody wants it; nothing is recorded yet
    read       every shard reads and checks the rows, beside training; what fails here changes nothing
    gate       workers stop pushing, as for a cut
    decided    recorded: from here on it happens, whoever dies. Whatever is in the way, it begins again, with another number
    replaced   every shard has put the rows into the table's blocks, one operation each, marks as they were
    done       recorded in the history, with a new generation of the placement, by which workers forget rows that they keep

Invariant: of the groups that were pushed before the gate nothing is left in the table, those that are pushed after it are applied
once and whole, whatever shards answered twice and however often it began; the exception of a cut's gate holds here, too: the one
group of a split whose worker is gone, or opened its gate by itself. No cut is made between decided and done. The coordinator's
lock covers the state; one event loop carries it out.
"""

import difflib
import logging
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from oarlock.checkpoint.cuts import split_cut
from oarlock.checkpoint.place import refuse_secret, same_place
from oarlock.client.job import OVER, TRAINING, WRITING
from oarlock.cluster.gate import Gate
from oarlock.cluster.store import Store
from oarlock.cluster.together import all_done
from oarlock.proto.errors import InvalidArgument, NotFound, PSError, Unavailable
from oarlock.proto.shard_pb2 import ReplaceRequest

if TYPE_CHECKING:
    from oarlock.client.router import ShardAddress
    from oarlock.cluster.coordinator import Coordinator

logger = logging.getLogger(__name__)

FACT, EVENT = "rollback", "rollback"
READ_SECONDS = 600.0
MAX_PATH = 4096
_ABSOLUTE = re.compile(r"/|[a-z][a-z0-9+.\-]*://")

Ordered = Callable[["ShardAddress", str, Any, float], Awaitable[Any]]


class Rollbacks:
    """``wanted``: what somebody asked for; ``decided``: what is recorded and not done yet."""

    def __init__(self, coordinator: "Coordinator") -> None:
        self._c = coordinator
        self.wanted: dict[str, Any] | None = None
        self.decided: dict[str, Any] | None = None
        self._asked = 0
        self._failed: dict[str, Any] = {}

    def take_up(self, store: Store) -> None:
        """Load what was recorded."""
        self.decided = store.fact(FACT)
        numbers = [event.get("number", 0) for event in self._c.events.all if event.get("event") == EVENT]
        if self.decided is not None:
            # Some shards may be there already, and refuse older ones.
            self._c.records.generation = max(self._c.generation, self.decided["generation"])
        self._asked = max([*numbers, (self.decided or {}).get("number", 0)], default=0)

    def go_back(self, store: Store) -> None:
        """The whole job goes back: no table of it does any more."""
        self.wanted = self.decided = None
        store.set_fact(FACT, None)

    def ask(self, table: str, path: str) -> int:
        """Want a table to go back; return the number by which ``told`` says what became of it."""
        c = self._c
        if c.spec.ranks:
            raise InvalidArgument(
                f"mode = {c.spec.mode!r} and the roll back of one table contradict each other: all tables are at one step; go "
                "back with the whole job: --resume --restore @CUT"
            )
        names = [t.name for t in c.spec.tables]
        if table not in names:
            near = difflib.get_close_matches(table, names, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise NotFound(f"job {c.spec.name} has no table {table[:80]!r}{hint} There are: {', '.join(names)}")
        if not _ABSOLUTE.match(path) or "\0" in path or len(path) > MAX_PATH:
            raise InvalidArgument(f"checkpoint {path[:80]!r}: give an absolute path or a URL, with a cut")
        # It is recorded, and told in every later manifest.
        refuse_secret(path, "checkpoint")
        if split_cut(path)[1] is None:
            raise InvalidArgument(
                f"checkpoint {path[:80]}: say which cut, as PATH@CUT: the newest may be another one soon"
            )
        c.roots.check(path)
        with c.lock:
            if c.phase not in (TRAINING, WRITING):
                raise InvalidArgument(f"job {c.spec.name} is {c.phase}: a table goes back while a job trains")
            known = self.decided or self.wanted
            if known is not None:
                if (known["table"], known["path"]) == (table, path):
                    return int(known["number"])
                raise Unavailable(f"table {known['table']} is on its way back to {known['path']}: one at a time")
            self._asked += 1
            self.wanted = {"number": self._asked, "table": table, "path": path}
            return self._asked

    def due(self) -> bool:
        """Whether one is to be carried out now."""
        return self.decided is not None or (self.wanted is not None and self._c.phase in (TRAINING, WRITING))

    def decide(self, order: dict[str, Any], gate: Gate) -> dict[str, Any]:
        """Record that it happens, at this gate; return what is recorded."""
        c = self._c
        with c.lock:
            generation = max(c.generation, order.get("generation", 0)) + 1
            with c.store as store:
                self.decided = {**order, "gate": gate.cut, "generation": generation}
                store.set_fact(FACT, self.decided)
            # Shards are told of it before it is one.
            c.records.reserved = generation
            self.wanted = None
            return self.decided

    def done(self, rows: int) -> None:
        """Record that it has happened, and let workers push again."""
        c = self._c
        with c.lock:
            order = self.decided
            assert order is not None, "nothing else ends what was decided"
            with c.store as store:
                values = {name: order[name] for name in ("number", "table", "path", "gate")}
                c.events.add(
                    store, EVENT, c.run, **values, cut=split_cut(order["path"])[1], rows=rows, step=c.work.steps
                )
                store.set_fact(FACT, None)
                c.next_generation(store, order["generation"])
            self.decided = None
            c.cuts.open()

    def give_up(self, error: str) -> None:
        """Note that what was wanted came to nothing; training goes on."""
        if self.wanted is not None:
            self._failed = {"number": self.wanted["number"], "error": error}
            logger.info("event=rollback_given_up table=%s error=%s", self.wanted["table"], error)
            self.wanted = None

    def pinned(self, root: str) -> list[int]:
        """Return the cuts of the store ``root`` that must stay for it."""
        orders = [order for order in (self.wanted, self.decided) if order is not None]
        found = [split_cut(order["path"]) for order in orders]
        return [cut for place, cut in found if cut is not None and same_place(place, root)]

    def told(self) -> dict[str, Any]:
        """Return what people ask: what is under way, and what failed last."""
        under_way = self.decided or self.wanted
        return {**({"under_way": under_way} if under_way else {}), **({"failed": self._failed} if self._failed else {})}


async def roll_back(c: "Coordinator", ordered: Ordered, gathered: Callable[[Gate], Awaitable[None]]) -> None:
    """Carry out what is due."""
    rollbacks = c.rollbacks
    order = rollbacks.decided or rollbacks.wanted
    assert order is not None, "asked for when it is due"
    again = rollbacks.decided is not None

    async def replaced(number: int, workers: list[int], generation: int) -> int:
        async def one(shard: "ShardAddress") -> int:
            request = ReplaceRequest(
                table=order["table"], path=order["path"], number=number, workers=workers, generation=generation
            )
            reply = await ordered(shard, "Replace", request, READ_SECONDS)
            return int(reply.rows)

        return sum(await all_done(map(one, c.shards.values())))

    gate: Gate | None = None
    try:
        await replaced(0, [], 0)
        with c.lock:
            gate = c.cuts.stand()
        await gathered(gate)
        decided = rollbacks.decide(order, gate)
        rows = await replaced(gate.cut, gate.workers, decided["generation"])
    except PSError as error:
        _not_now(c, error, order, gate, again=again)
        return
    rollbacks.done(rows)
    logger.info("event=rolled_back table=%s path=%s rows=%d", order["table"], order["path"], rows)


def _not_now(c: "Coordinator", error: PSError, order: dict[str, Any], gate: Gate | None, *, again: bool) -> None:
    with c.lock:
        if gate is not None:
            c.cuts.open()
        if c.rollbacks.decided is None:
            c.rollbacks.give_up(str(error))
        elif not error.retryable and c.phase not in OVER:
            c.fail(
                f"table {order['table']} went back to {order['path']} on some shards and not on all: {error}; go on from the "
                "last checkpoint with --resume"
            )
        else:
            logger.warning("event=rollback_again table=%s begun_before=%s error=%s", order["table"], again, error)
