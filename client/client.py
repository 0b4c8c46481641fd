# SPDX-License-Identifier: Apache-2.0
"""Client: pull and push for a member of a job.

Invariant: a pull is complete, and a push acknowledged by every block, when its awaitable is done. One event loop; several
calls may be in flight at once, but groups of one split are pushed one after another (the caller's duty, SEMANTICS section 2).
"""

from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from oarlock.client.caches import Caches
from oarlock.client.encoding import PushEncoder
from oarlock.client.everyone import ask_everyone
from oarlock.client.feedback import SplitFeedback
from oarlock.client.forms import Forms
from oarlock.client.membership import Membership
from oarlock.client.probe import Probe
from oarlock.client.pull import pull
from oarlock.client.push import PushCounts, PushIdentity, RowGradients, cut_push, push
from oarlock.client.router import Routes, ShardAddress
from oarlock.client.stage import Commit, latest_step
from oarlock.embedding.keys import KeySet
from oarlock.proto.buffers import Buffers
from oarlock.proto.errors import Malformed, Unavailable
from oarlock.proto.shard_pb2 import MarksReply, MarksRequest
from oarlock.telemetry.stages import Stages

T = TypeVar("T")

# Pushes' copies of gradients whose memory is kept: those of the splits that a worker has open, or of as many shards.
MOST_COPIES = 16


class Pushing:
    """A push whose messages are made; to be awaited once, which sends them."""

    def __init__(self, send: Callable[[], Coroutine[Any, Any, PushCounts]]) -> None:
        self._send = send

    def __await__(self) -> Generator[Any, None, PushCounts]:
        return self._send().__await__()


class Client:
    """Moves rows and gradients between this process and the shards of its job."""

    def __init__(self, membership: Membership) -> None:
        self._member = membership
        self._copies = Buffers(MOST_COPIES)
        # Pulls and pushes, from the first request to the last answer.
        self.stages = Stages()
        spec = membership.spec
        self._forms = Forms(membership.layout, spec.compression, spec.seed) if spec.compression else None

    async def _timed(self, stage: str, work: Callable[[], Coroutine[Any, Any, T]], **arguments: int) -> T:
        with self.stages.time(stage, **arguments):
            return await work()

    @property
    def routes(self) -> Routes:
        """The newest placement; Unavailable before there is one."""
        if self._member.routes is None:
            raise Unavailable("the job has no placement yet: its shards are still joining")
        return self._member.routes

    def pull(
        self,
        keys: Mapping[str, KeySet],
        rows: Mapping[str, NDArray[np.float32]],
        *,
        dense: NDArray[np.float32] | None = None,
        number: int = 0,
        lossless: bool = True,
        caches: Caches | Probe | None = None,
        about: Mapping[str, int] | None = None,
        commit: Commit | None = None,
    ) -> Awaitable[dict[int, int]]:
        """Fill ``rows[table]`` float32[u, dim] with the rows of ``keys[table]``, and ``dense`` float32[P] if given.

        ``number``: under ssp, 1 + the number of the group that the rows are for. The result is for the ``push`` that comes of
        it: pushes that each shard had applied. After an error the arrays may hold anything. Unless ``lossless``, values come in
        the job's forms (``JobSpec.compression``). ``caches``: rows that are kept there and new enough do not come. ``about``:
        what tells the pull from others in a trace. ``commit``: under sync, of the rank that pulls; Behind if its step is past.
        """
        forms = None if lossless else self._forms
        work = partial(pull, self._member, self.routes, keys, rows, dense, number, forms, caches, commit)
        return self._timed("pull", work, rows=sum(len(found.keys) for found in keys.values()), **(about or {}))

    def push(
        self,
        split: int,
        group: int,
        gradients: Mapping[str, RowGradients],
        *,
        dense: NDArray[np.float32] | None = None,
        dense_rate: float = 0.0,
        step: int = 0,
        number: int = 0,
        seen: Mapping[int, int] | None = None,
        feedback: SplitFeedback | None = None,
        last: bool = False,
        rank: int = 0,
    ) -> Pushing:
        """Push what group ``group`` of ``split`` adds to the rows and, in ``dense`` float32[P], to all dense parameters.

        ``step``: groups that all workers have trained, as far as known; ``number`` as in ``pull``; ``seen``: what the pull
        returned that fed the group, from which shards count staleness. Gradients travel in the job's forms; where these keep
        what they leave out, ``feedback`` is the split's (``new_feedback``), and ``last`` says that no group follows; groups of
        such a split are made in their order, one at a time. ``rank``: under sync, 1 + the rank whose part it is. The messages
        are made before this returns, in any thread: the arrays may be reused at once. They are sent when the result is awaited.
        """
        identity, routes = PushIdentity(split, group, step, number, seen or {}, rank), self.routes
        encoder = None if self._forms is None else PushEncoder(self._forms, routes, identity, feedback, last)
        messages = cut_push(
            self._member.layout,
            routes,
            identity,
            gradients,
            dense,
            dense_rate,
            copies=self._copies,
            encoder=encoder,
        )
        work = partial(push, self._member, messages)
        return Pushing(partial(self._timed, "push", work, split=split, group=group))

    def new_feedback(self) -> SplitFeedback | None:
        """Return what a split that is opened keeps from group to group; None if the job keeps nothing."""
        return SplitFeedback() if self._forms is not None and self._forms.feedback else None

    async def latest_step(self, rank: int) -> int:
        """Return the step from which a successor of a rank goes on under sync."""
        return await latest_step(self._member, self.routes, rank)

    async def next_group(self, split: int) -> int:
        """Return the group of ``split`` at which a successor starts: the highest that any block has applied, 0 if none."""
        member = self._member

        async def ask(shard: ShardAddress, timeout: float) -> int:
            request = MarksRequest(header=member.header(shard.incarnation), splits=[split])
            reply: MarksReply = await member.transport.call(
                shard.address, "Shard.Marks", request, timeout_seconds=timeout
            )
            if len(reply.next) != 1:
                raise Malformed(f"shard {shard.id} answered {len(reply.next)} marks, asked for one", shard=shard.id)
            return int(reply.next[0])

        applied = await ask_everyone(member, self.routes, ask)
        # That group may be missing in some blocks: it is sent again, and the blocks that have it skip it.
        return max(0, max(applied, default=0) - 1)
