# SPDX-License-Identifier: Apache-2.0
"""What happens to a modelled cluster that is no message: deaths, silence, restarts, scaling, cuts.

Invariant: a job that rolls back is not robbed of all copies of a block, as far as records tell.
"""

import numpy as np
from copies_model import Model
from copies_shard import OPEN, Shard

from oarlock.client.job import OVER
from oarlock.cluster.scaling import scale
from oarlock.proto import coordinator_pb2 as pb


def strike(model: Model) -> None:
    """Let something happen that is no message."""
    c, rng = model.c, model.rng
    what = rng.choice(("kill", "kill", "silence", "restart", "tear", "scale", "join", "cut", "slow", "late", "prompt"))
    alive = [s for s in model.shards.values() if s.alive and s.heard]
    if what in ("kill", "silence") and (victim := _victim(model, alive)) is not None:
        _end(model, victim, silently=what == "silence")
    elif what == "restart":
        model.restart()
    elif what == "tear":
        model.store.tear = rng.randrange(30)
    elif what == "scale":
        model.doing(lambda: scale(c, rng.randrange(model.spec.replicas + 1, 5), 0))
    elif what == "join" and len(alive) < c.scaling.servers:
        model.join()
    elif what == "cut" and c.cuts.gate is None:
        model.doing(lambda: _cut(model))
    elif what == "slow":
        _slow(model)
    elif what in ("late", "prompt"):
        model.losing = rng.random() * 0.4 if what == "late" else 0.0


def _victim(model: Model, alive: list[Shard]) -> Shard | None:
    """Return a shard whose death loses nothing, as the records are now."""
    others = {s.id for s in alive}
    found = []
    for shard in alive:
        rest = np.array(sorted(others - {shard.id}), np.int32)
        if (
            model.spec.on_loss == "reload"
            or np.isin(model.c.records.members, rest).any(axis=1).all()
            or not len(model.c.records.named(shard.id))
        ):
            found.append(shard)
    return model.rng.choice(found) if found else None


def _end(model: Model, shard: Shard, *, silently: bool) -> None:
    if silently:
        # It goes on, and nobody knows: what it believes to own is somebody else's soon.
        shard.heard = False
        return
    shard.alive = False
    if model.rng.random() < 0.7:
        member = model.c.members.all[shard.incarnation]
        model.doing(lambda: model.c.member_gone(member, "dead", "killed"))


def _slow(model: Model) -> None:
    owners = [s for s in model.shards.values() if s.alive and s.heard]
    for shard in owners:
        for block, state in shard.blocks.items():
            if state.role == OPEN and state.required and model.rng.random() < 0.1:
                model.tell(shard, pb.SLOW, block, state.generation, shard=model.rng.choice(sorted(state.required)))


def _cut(model: Model) -> None:
    """As cutting does: moves are held back until all is calm, and records stay as they are while the gate stands."""
    c = model.c
    c.copies.held = True
    for _ in range(40):
        if c is not model.c or c.phase in OVER:
            return
        if c.copies.calm:
            break
        model.step()
    else:
        c.copies.moving.give_up_closed()
    if c is model.c and c.copies.calm and c.phase not in OVER:
        c.cuts.stand()
        generation = c.generation
        for _ in range(model.rng.randrange(10)):
            if c is model.c and c.phase not in OVER:
                model.step()
        if c is model.c and c.phase not in OVER:
            assert c.generation == generation, "a record changed while a gate stood"
            c.cuts.open()
    c.copies.held = False
