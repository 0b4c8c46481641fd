# SPDX-License-Identifier: Apache-2.0
"""Error feedback: what compression left out of a key's gradients is added to its next one.

Invariant: for each key, what was sent and what is kept (or was lost, and counted) add up to what was given; the bytes
depend on the order of calls alone. A gradient that is refused where it arrives is sent alone, and what is kept for its
key stays. Memory is fixed when the object is made. One object a table and split, for one thread.

Seide, Fu, Droppo, Li, Yu: 1-Bit Stochastic Gradient Descent, Interspeech 2014. Stich, Cordonnier, Jaggi: Sparsified SGD
with Memory, NeurIPS 2018.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.compress import Draw, RowCodec
from oarlock.embedding.compress_lru import (
    COUNT,
    LOST,
    STATES,
    ask_for_neighbours,
    ask_for_place,
    ask_for_slot,
    from_oldest,
    reset,
    use,
)
from oarlock.embedding.compress_rows import decode_one, encode_one, rounding_seed
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import LINE, Int, address_in, kernel_array, prefetch
from oarlock.embedding.refusal import poisonous
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory

REFUSED = STATES  # more of what compress_lru.py calls state
DROPPED = STATES + 1
_SLOT_BYTES = 8 + 8 + 16  # beside its row: a key, two links, and up to four places of the index
_AHEAD = 8
_MOST_SLOTS = (1 << 30) - 1


@jit
def encode_with_residuals(
    index: NDArray[np.int32],
    known: NDArray[np.uint64],
    links: NDArray[np.int32],
    state: NDArray[np.int64],
    kept: NDArray[np.float32],
    work: NDArray[np.float32],
    keys: NDArray[np.uint64],
    gradients: NDArray[np.float32],
    rows: Int,
    stride: Int,
    code: Int,
    k: Int,
    limit: np.uint32,
    random: bool,
    start: np.uint64,
    step: Int,
) -> None:
    """Write gradients: float32[n, dim] plus what is kept for their keys as n rows; keep what these leave out.

    ``kept``: float32[slots, dim]; ``work``: float32[2, dim].
    """
    dim = gradients.shape[1]
    total, sent = address_in(work, 0), address_in(work, 4 * dim)
    n = keys.shape[0]
    for i in range(n):
        # Every key is somewhere else in memory: each step of its way there is asked for while others are worked on.
        if i + 3 * _AHEAD < n:
            ask_for_place(index, keys[i + 3 * _AHEAD])
        if i + 2 * _AHEAD < n:
            slot = ask_for_slot(index, known, links, keys[i + 2 * _AHEAD])
            if slot >= 0:
                for line in range(0, 4 * dim, LINE):
                    prefetch(address_in(kept, 4 * dim * slot + line))
        if i + _AHEAD < n:
            ask_for_neighbours(index, links, keys[i + _AHEAD])
        row = rows + i * stride
        seed = rounding_seed(start, keys[i], step)
        gradient = address_in(gradients, 4 * dim * i)
        if poisonous(gradient, dim, limit):
            state[REFUSED] += 1
            encode_one(row, code, dim, k, gradient, limit, random, seed)
            continue
        slot, found = use(index, known, links, state, keys[i])
        for column in range(dim):
            work[0, column] = gradients[i, column]
        if found:
            for column in range(dim):
                work[0, column] += kept[slot, column]
            if poisonous(total, dim, limit):  # all of it would be refused
                state[DROPPED] += 1
                for column in range(dim):
                    work[0, column] = gradients[i, column]
        encode_one(row, code, dim, k, total, limit, random, seed)
        decode_one(row, code, dim, k, sent)
        for column in range(dim):
            kept[slot, column] = work[0, column] - work[1, column]


class Residuals:
    """What is kept for the keys of one table and one split, within ``max_bytes``.

    Where these are full, the key used least recently gives way, and what was kept for it is lost. What is given to the
    codec must be the gradients of ``codec.limit``'s table.
    """

    def __init__(self, codec: RowCodec, max_bytes: int) -> None:
        room = min(max_bytes // (4 * codec.dim + _SLOT_BYTES), _MOST_SLOTS)
        if room < 1:
            raise InvalidArgument(
                f"residuals of {max_bytes} bytes: give at least the {4 * codec.dim + _SLOT_BYTES} that one key takes"
            )
        self.codec = codec
        self.room = room
        try:  # memory that is never written to is not taken from the machine
            self._index: NDArray[np.int32] = np.zeros(1 << (2 * room - 1).bit_length(), np.int32)
            self._known: NDArray[np.uint64] = np.empty(room, np.uint64)
            self._links: NDArray[np.int32] = np.empty((room, 2), np.int32)
            self._kept: NDArray[np.float32] = np.empty((room, codec.dim), np.float32)
        except MemoryError:
            raise OutOfMemory(f"no memory for residuals of {max_bytes} bytes: give them fewer") from None
        self._work: NDArray[np.float32] = np.empty((2, codec.dim), np.float32)
        self._state: NDArray[np.int64] = np.zeros(STATES + 2, np.int64)
        self._state[1:3] = -1

    def encode(
        self, keys: NDArray[np.uint64], gradients: NDArray[np.float32], out: NDArray[np.uint8], draw: Draw | None = None
    ) -> int:
        """Write gradients: float32[n, dim] of keys: uint64[n], corrected, to ``out``; as RowCodec.encode otherwise.

        Once a group: a payload that has to be sent again is sent as it was made.
        """
        codec = self.codec
        keys = kernel_array("keys", keys, np.uint64)
        gradients = kernel_array("gradients", gradients, np.float32, 2)
        if gradients.shape != (len(keys), codec.dim):
            raise Malformed(f"gradients of shape {gradients.shape}, wanted {(len(keys), codec.dim)}")
        drawn, draw = codec.drawn(draw, len(keys))
        if len(drawn) and not np.array_equal(drawn, keys):
            raise InvalidArgument("rounding must be drawn by the keys that the gradients are of")

        def fill(rows: int) -> None:
            encode_with_residuals(
                self._index,
                self._known,
                self._links,
                self._state,
                self._kept,
                self._work,
                keys,
                gradients,
                rows,
                codec.row_bytes,
                codec.code,
                codec.compression.k,
                codec.limit,
                codec.compression.rounding == "stochastic",
                np.uint64(draw.start),
                draw.step,
            )

        return codec.write(len(keys), out, fill)

    def drain(self) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """Return all keys: uint64[m], the one used least recently first, and what is kept for them: float32[m, dim].

        It forgets them: they belong into the last group of the split, which is sent without loss.
        """
        slots = np.empty(int(self._state[COUNT]), np.int64)
        from_oldest(self._links, self._state, slots)
        found = self._known[slots], self._kept[slots]
        reset(self._index, self._state)
        return found

    def clear(self) -> None:
        """Forget all that is kept, as a new split does, and after a restore."""
        reset(self._index, self._state)

    def stats(self) -> dict[str, Any]:
        """Return keys and room; keys ``lost`` for want of room, ``dropped`` as their sums would be refused; ``refused``."""
        counts = {"lost": LOST, "dropped": DROPPED, "refused": REFUSED}
        return {"keys": int(self._state[COUNT]), "room": self.room} | {
            k: int(self._state[v]) for k, v in counts.items()
        }
