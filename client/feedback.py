# SPDX-License-Identifier: Apache-2.0
"""Error feedback of one open split: what its groups have left out so far, of every table and of the dense parameters.

Invariant: what was sent of a split's groups and what is kept here add up to what was given; the last group takes all of it along
and is sent without loss. Each group goes through once, in the order of the split: what is sent again is sent as it was made.
One thread at a time; nothing of it outlives the split.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from oarlock.client.packed import Form, decode_dense, encode_dense
from oarlock.client.push import RowGradients
from oarlock.embedding.compress_residuals import Residuals
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.proto.errors import InvalidArgument

# Of one table and split; beyond it what is kept for the key used least recently is lost.
RESIDUAL_BYTES = 64 << 20


class SplitFeedback:
    """What is kept between the groups of one split; made when the split is opened, and dropped with it."""

    def __init__(self, max_bytes: int = RESIDUAL_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rows: dict[str, Residuals] = {}
        self._dense: NDArray[np.float32] | None = None
        self._next = 0
        # Keys whose rest was lost, for want of room or because the sum would have been refused.
        self.lost = 0

    def begin(self, group: int) -> None:
        """Take up a group; InvalidArgument if it is not after all that came."""
        if group < self._next:
            raise InvalidArgument(
                f"group {group} of a split after group {self._next - 1}: what it left out is kept already"
            )
        self._next = group + 1

    def rows(self, table: str, form: Form, part: RowGradients) -> NDArray[np.uint8]:
        """Return uint8[u, bytes]: a group's gradients and what earlier ones left out, encoded; keep what this leaves out."""
        codec = form.rows(part.gradients.shape[1])
        kept = self._rows.get(table)
        if kept is None:
            kept = self._rows[table] = Residuals(codec, max(self._max_bytes, 4 * codec.dim + 64))
        before = self._lost_of(kept)
        out: NDArray[np.uint8] = np.empty(codec.size(len(part.gradients)), np.uint8)
        kept.encode(part.keys.keys, part.gradients, out)
        self.lost += self._lost_of(kept) - before
        return out.reshape(len(part.gradients), codec.row_bytes)

    def drain(
        self, table: str, part: RowGradients, blocks: int, ranks: NDArray[np.int32], limit: float
    ) -> RowGradients:
        """Return the last group's gradients with all that is kept for the table, also for keys that the group has not.

        A key that only is here came no more often by it: its occurrences are 0. A gradient that is to be refused goes alone.
        """
        kept = self._rows.pop(table, None)
        if kept is None:
            return part
        keys, values = kept.drain()
        mine = len(part.keys.keys)
        merged = KeySorter().build(
            np.concatenate([part.keys.keys, keys]), table_salt(table), blocks.bit_length() - 1, ranks
        )
        own, rest = merged.inverse[:mine], merged.inverse[mine:]
        gradients: NDArray[np.float32] = np.zeros((len(merged.keys), values.shape[1]), np.float32)
        gradients[rest] = values
        with np.errstate(invalid="ignore", over="ignore"):
            poison = ~(np.abs(part.gradients) < limit).all(axis=1)
            gradients[own] += part.gradients
        if poison.any():
            self.lost += int(np.isin(own[poison], rest).sum())
            gradients[own[poison]] = part.gradients[poison]
        out = replace(part, keys=merged, gradients=gradients)
        if part.occurrences is not None:
            occurrences: NDArray[np.uint32] = np.zeros(len(merged.keys), np.uint32)
            occurrences[own] = part.occurrences
            out = replace(out, occurrences=occurrences)
        if part.clicks is not None:
            clicks: NDArray[np.float32] = np.zeros(len(merged.keys), np.float32)
            clicks[own] = part.clicks
            out = replace(out, clicks=clicks)
        return out

    def dense(self, form: Form, gradients: NDArray[np.float32], lengths: Sequence[int]) -> NDArray[np.uint8]:
        """Return the bytes of all dense blocks with what earlier groups left out; keep what this leaves out."""
        total, alone = self._with_kept(gradients, lengths, form.limit)
        out = encode_dense(form, total, lengths)
        sent = np.empty_like(total)
        decode_dense(form, out, lengths, sent)
        with np.errstate(invalid="ignore", over="ignore"):
            left = total - sent
        # What is refused is refused whole: nothing of it was sent, and what was kept stays for the next group.
        self._dense = np.where(alone, 0.0 if self._dense is None else self._dense, left).astype(np.float32)
        return out

    def drain_dense(self, gradients: NDArray[np.float32], lengths: Sequence[int], limit: float) -> NDArray[np.float32]:
        """Return the last group's dense gradients with all that is kept."""
        total, _ = self._with_kept(gradients, lengths, limit)
        self._dense = None
        return total

    def _with_kept(
        self, gradients: NDArray[np.float32], lengths: Sequence[int], limit: float
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return float32[n], gradients and what is kept, and bool[n], where a block is to be refused and goes alone."""
        with np.errstate(invalid="ignore", over="ignore"):
            starts = np.cumsum([0, *lengths[:-1]])
            bad = ~(np.abs(gradients) < limit)
            alone = np.repeat(np.logical_or.reduceat(bad, starts), lengths)
            if self._dense is None:
                return gradients, alone
            total = gradients + self._dense
            over = ~alone & ~(np.abs(total) < limit)
            if over.any():
                self.lost += int(over.sum())
                total = np.where(over, gradients, total)
            return np.where(alone, gradients, total).astype(np.float32), alone

    @staticmethod
    def _lost_of(kept: Residuals) -> int:
        found = kept.stats()
        return int(found["lost"]) + int(found["dropped"])
