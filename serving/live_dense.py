# SPDX-License-Identifier: Apache-2.0
"""The dense parameters of a live model: all of them, as far as their shards have told, as one array that is exchanged whole.

    gathered    values as they come, by block, with the stamp of who told them
    values      a copy of these, made when all that a shard had to tell is here; nobody changes it

Invariant: ``values`` has every block, of each shard those of one instant, unless they are more than one answer has; it is
another array whenever a value is another one. What does not fit, or is no finite number, is Malformed and changes nothing.
Whoever changes it has the model's lock; ``values`` is read without.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.client.router import ShardAddress
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import Malformed
from oarlock.proto.shard_pb2 import ChangesReply, ChangesRequest

Numbers = NDArray[np.int32]

# A stamp is 1 + a block's operations in so many bits; above them is how often its content was exchanged where it is.
OPERATIONS = np.uint64((1 << 40) - 1)


class LiveDense:
    """The dense parameters of ``layout``, unknown at first, as they were ``now`` by the monotonic ``clock``."""

    def __init__(self, layout: Layout, *, now: float, clock: Callable[[], float]) -> None:
        self._base = layout.dense_base
        self._offsets, self._lengths = layout.dense_offsets, layout.dense_lengths
        self._index = {layout.name(layout.dense_base + n): n for n in range(len(layout.dense_blocks))}
        self._clock = clock
        blocks = len(layout.dense_blocks)
        self._gathered: NDArray[np.float32] = np.zeros(layout.dense_size, np.float32)
        self._stamps: NDArray[np.uint64] = np.zeros(blocks, np.uint64)
        self._sources: NDArray[np.int64] = np.zeros(blocks, np.int64)
        # After how many operations values are as they are gathered, whoever told that; -1: not known.
        self._operations: NDArray[np.int64] = np.full(blocks, -1, np.int64)
        # Of a question: what was asked, and, of the answers to it and to those before it, what is here that nobody sees yet.
        self._asked: NDArray[np.bool_] = np.zeros(blocks, np.bool_)
        self._fresh: NDArray[np.bool_] = np.zeros(blocks, np.bool_)
        self._told_at: NDArray[np.float64] = np.full(blocks, now)
        self._confirmed: NDArray[np.float64] = np.full(blocks, now)
        self.values: NDArray[np.float32] | None = None if blocks else self._gathered
        self._oldest = now
        # Whether all of them were told by shards.
        self.told: bool = not blocks

    @property
    def age(self) -> float:
        """How many seconds ago values were the shards' own, of the block of which that is longest ago."""
        return max(0.0, self._clock() - self._oldest) if len(self._confirmed) else 0.0

    def lacks(self, name: str, block: int, sequence: int) -> bool:
        """Return whether there is such a block, and its state after ``sequence`` operations is newer than what is here of it."""
        at = self._index.get((name, block))
        return at is not None and bool(self._operations[at] < sequence)

    def fill(self, name: str, block: int, sequence: int, values: NDArray[np.float32], at: float) -> None:
        """Have a block be as a cut has it, where it was so ``at``, unless it is newer by now; seen once ``publish`` is called."""
        number = self._index[name, block]
        if values.size != self._lengths[number] or not np.isfinite(values).all():
            raise Malformed(f"dense {name}, block {block}: {values.size} values of a cut, or one is not finite")
        if self._operations[number] < sequence:
            self._put(number, values.reshape(-1))
            self._forget(np.array([number]))
            self._operations[number] = sequence
            self._confirmed[number] = at if not self.told else max(at, float(self._confirmed[number]))

    def publish(self) -> None:
        """Have what is gathered be seen, if it is all there."""
        self._oldest = float(self._confirmed.min(initial=np.inf))
        if (self._operations >= 0).all() and len(self._operations):
            made = self._gathered.copy()
            made.flags.writeable = False
            self.values = made

    # The exchange with a shard

    def question(self, shard: ShardAddress, numbers: Numbers, request: ChangesRequest) -> None:
        """Ask a shard about its blocks, numbers: int32[m] ascending in the layout."""
        if not len(numbers):
            return
        blocks = numbers - self._base
        anew = blocks[self._sources[blocks] != shard.incarnation]
        self._forget(anew)
        self._sources[anew] = shard.incarnation
        # What came before is not asked for again until all else is here, for it may have changed again meanwhile.
        asked = blocks[~self._fresh[blocks]]
        self._asked[blocks] = False
        self._asked[asked] = True
        request.dense.CopyFrom(pack((asked + self._base).astype(np.int32)))
        request.dense_stamps.CopyFrom(pack(self._stamps[asked]))

    def checked(
        self, shard: ShardAddress, reply: ChangesReply
    ) -> tuple[Numbers, NDArray[np.uint64], NDArray[np.float32]]:
        """Return the blocks that an answer has, with their stamps and values; Malformed unless they were asked for."""
        numbers = unpack(reply.dense, np.int32, "dense blocks").astype(np.int64) - self._base
        stamps = unpack(reply.dense_stamps, np.uint64, "stamps")
        values = unpack(reply.dense_values, np.float32, "dense values")
        if len(numbers) and (
            numbers[0] < 0 or numbers[-1] >= len(self._lengths) or not (numbers[1:] > numbers[:-1]).all()
        ):
            raise Malformed(f"dense blocks are not ascending, each one of {len(self._lengths)}")
        if not (self._asked[numbers] & (self._sources[numbers] == shard.incarnation)).all():
            raise Malformed("dense blocks came that were not asked for")
        if len(stamps) != len(numbers) or not stamps.all():
            raise Malformed(f"{len(numbers)} dense blocks with {len(stamps)} stamps, or one of 0")
        if len(values) != int(self._lengths[numbers].sum()):
            raise Malformed(f"{len(values)} values of dense blocks that have {int(self._lengths[numbers].sum())}")
        if not np.isfinite(values).all():
            raise Malformed("a dense value is not a finite number")
        return numbers.astype(np.int32), stamps, values

    def apply(self, shard: ShardAddress, numbers: Numbers, reply: ChangesReply, at: float) -> bool:
        """Take over an answer about blocks, numbers: int32[m] in the layout, of values as they were ``at``.

        Return whether to ask for more at once: they come in several answers, one of which may be older than the last one.
        """
        found, stamps, values = self.checked(shard, reply)
        blocks = numbers - self._base
        several = bool(reply.dense_left and len(found)) or bool(self._fresh[blocks].any())
        begin = 0
        for block in found.tolist():
            self._put(block, values[begin : (begin := begin + int(self._lengths[block]))])
        self._stamps[found] = stamps
        self._operations[found] = (stamps & OPERATIONS).astype(np.int64) - 1
        self._fresh[found], self._told_at[found] = True, at
        if reply.dense_left:
            return several
        # The others are as they were, if anything is known of them.
        mine = blocks[(self._sources[blocks] == shard.incarnation) & (self._stamps[blocks] > 0)]
        same = mine[self._asked[mine] & ~self._fresh[mine]]
        self._told_at[same] = at
        self._confirmed[mine] = np.maximum(self._confirmed[mine], self._told_at[mine])
        changed = self._fresh[mine].any()
        self._fresh[mine] = False
        self.told = self.told or bool((self._stamps > 0).all())
        if changed:
            self.publish()
        self._oldest = float(self._confirmed.min(initial=np.inf))
        return several

    def moved(self, numbers: Numbers) -> None:
        """Believe a shard no more about blocks that it said are elsewhere."""
        blocks = numbers[numbers >= self._base] - self._base
        self._forget(blocks)
        self._sources[blocks] = 0

    def _forget(self, blocks: NDArray[np.integer[Any]]) -> None:
        self._stamps[blocks] = 0
        self._fresh[blocks] = False

    def _put(self, block: int, values: NDArray[np.float32]) -> None:
        begin = int(self._offsets[block])
        self._gathered[begin : begin + len(values)] = values
