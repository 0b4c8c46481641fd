# SPDX-License-Identifier: Apache-2.0
"""What workers keep of their splits, tested at every push: its rows and dense values hold what error feedback sends, to the bit.

Invariant: what a worker sends follows from the batches and the group at which it took up the split, with nothing kept; it is
worked out here by formulas of its own, and looked for in the values, not in messages or marks. Sums are exact (rough.py), so of
a split that one worker sent whole nothing is missing, and of another one what is missing must have been reported as lost.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.compression import DENSE, Way
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.cluster.coordinator import Coordinator
from oarlock.proto.arrays import unpack
from oarlock.proto.errors import PSError
from oarlock.ps.shard import Shard
from oarlock.simulation.counting import RATE
from oarlock.simulation.invariants import Violation
from oarlock.simulation.rough import DIM, KEYS, TABLE, VALUES, dense_of, keys_by_block, rows_of

Values = NDArray[np.float64]
Have = NDArray[np.bool_]


def sent_of(way: Way, values: Values) -> Values:
    """Return what arrives of float64[n, columns] under a form; by its definition in docs/compression.md."""
    given = values.astype(np.float32)
    if way.codec == "float16":
        return given.astype(np.float16).astype(np.float64)
    if way.codec == "bfloat16":
        bits = given.view(np.uint32)
        kept = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) & np.uint32(0xFFFF0000)
        return kept.view(np.float32).astype(np.float64)
    if way.codec == "int8":
        scale = np.abs(given).max(axis=1, keepdims=True) / np.float32(127)
        quotients: Values = np.rint(given / np.where(scale == 0, np.float32(1), scale)).astype(np.float64)
        widened: Values = quotients * scale.astype(np.float64)
        return widened
    out = np.zeros_like(values)
    largest = np.argsort(-np.abs(values), axis=1, kind="stable")[:, : way.columns(values.shape[1])]
    np.put_along_axis(out, largest, np.take_along_axis(values, largest, axis=1), axis=1)
    return out


@dataclass
class _Sent:
    """What one worker makes of one split: the rest that it keeps, and by group what it sends, and to which keys."""

    next: int
    rows: Values = field(default_factory=lambda: np.zeros((KEYS, DIM)))
    known: Have = field(default_factory=lambda: np.zeros(KEYS, np.bool_))
    dense: Values = field(default_factory=lambda: np.zeros((1, VALUES)))
    groups: dict[int, tuple[Have, Values, Values]] = field(default_factory=dict)


@dataclass
class _Applied:
    """What the shards have of one split, and the last group of each block: those of the keys, and the dense one."""

    rows: Values = field(default_factory=lambda: np.zeros((KEYS, DIM)))
    dense: Values = field(default_factory=lambda: np.zeros((1, VALUES)))
    last: list[int] = field(default_factory=lambda: [-1] * (KEYS + 1))


class Residuals:
    """Follows the rough rows and values of one job."""

    def __init__(self, spec: JobSpec) -> None:
        self.kept = TABLE in spec.compression
        # Splits that workers had when they ended, or gave back; at the most.
        self._ended = 0
        self._open_splits = spec.open_splits
        if not self.kept:
            return
        self._splits = splits = spec.splits * spec.epochs
        self._per_split = spec.dense[1].size // splits
        self._accumulate = spec.accumulate
        self._groups = -(-self._per_split // spec.accumulate)
        self._ways = spec.compression[TABLE].pushed, spec.compression[DENSE].pushed
        self._keys = keys_by_block(TABLE, KEYS, splits)
        layout = Layout(spec.tables, spec.dense)
        self._table = layout.table_index[TABLE]
        self._base = layout.table_base[self._table]
        # One dense block each of the parameters before.
        self._dense_base = layout.dense_base + 2
        self._sent: dict[tuple[int, int], _Sent] = {}
        self._applied = [_Applied() for _ in range(splits)]

    def pushed(self, shard: Shard, request: Any, reply: Any) -> None:
        """After a shard handled a push, whatever came of it."""
        if not self.kept or request.split >= self._splits:
            return
        split, group, applied = request.split, request.group, self._applied[request.split]
        sent = self._sent.setdefault((split, request.header.sender), _Sent(group))
        if group > sent.next or (group < sent.next and group not in sent.groups):
            raise Violation(f"F1: group {group} of split {split} came from a worker that was at group {sent.next}")
        if group == sent.next:
            self._send(sent, split, group)
        touched, rows, dense = sent.groups[group]
        # An error is one of the tables before, or of all of the message.
        fresh = not isinstance(reply, PSError) and split not in shard.closed
        here = shard.owned[self._base : self._base + KEYS]
        # One that came here meanwhile is in another message.
        in_it, dense_in_it = self._in(request)
        for key in np.flatnonzero(here & touched & in_it).tolist():
            if fresh and group > applied.last[key]:
                applied.last[key] = group
                applied.rows[key] += rows[key]
        if fresh and dense_in_it and shard.owned[self._dense_base + split] and group > applied.last[KEYS]:
            applied.last[KEYS] = group
            applied.dense += dense
        self._compare(shard, split, here, f"after group {group} of worker {request.header.sender}")

    def _in(self, request: Any) -> tuple[Have, bool]:
        """Return which keys a push has something for, and whether it has for its split's dense block."""
        keys = np.zeros(KEYS, np.bool_)
        for part in request.tables:
            if part.keys.table == self._table:
                # Each of them is in a block of its own.
                keys[unpack(part.keys.blocks, np.int32, "blocks")] = True
        numbers = [unpack(part.blocks, np.int32, "blocks") for part in request.dense]
        return keys, any(self._dense_base + request.split in found for found in numbers)

    def _given(self, split: int, group: int) -> tuple[Have, Values, Values]:
        first = split * self._per_split
        numbers = range(first + group * self._accumulate, first + self._per_split)[: self._accumulate]
        found = [rows_of(number) for number in numbers]
        dense = np.sum([dense_of(number) for number in numbers], axis=0, dtype=np.float64)
        rows = np.sum([rows for _, rows in found], axis=0, dtype=np.float64)
        return np.any([present for present, _ in found], axis=0), rows, dense[None]

    def _send(self, sent: _Sent, split: int, group: int) -> None:
        """Work out a group that comes for the first time."""
        present, rows, dense = self._given(split, group)
        rows = np.where(present[:, None], rows + sent.rows, 0.0)
        dense = dense + sent.dense
        if group == self._groups - 1:
            # Whole, with all that is kept, also of keys that it has not.
            sent.groups[group] = (present | sent.known, np.where(present[:, None], rows, sent.rows), dense)
        else:
            out = sent_of(self._ways[0], rows), sent_of(self._ways[1], dense)
            sent.rows = np.where(present[:, None], rows - out[0], sent.rows)
            sent.dense = dense - out[1]
            sent.known = sent.known | present
            sent.groups[group] = (present, *out)
        sent.next = group + 1

    def _compare(self, shard: Shard, split: int, here: Have, when: str) -> None:
        applied = self._applied[split]
        found = {f"of key {key}": (row, applied.rows[key]) for key, row in self._rows(shard, split, here).items()}
        if shard.owned[self._dense_base + split]:
            values = np.empty(VALUES, np.float32)
            shard.dense[2].pull_block(split, values)
            found["of its dense block"] = values.astype(np.float64) / -RATE, applied.dense[0]
        for what, (there, sent) in found.items():
            if not np.array_equal(there, sent):
                raise Violation(f"F1: {when} split {split} has {there.tolist()} {what}, and was sent {sent.tolist()}")

    def _rows(self, shard: Shard, split: int, here: Have) -> dict[int, Values]:
        blocks = np.flatnonzero(here).astype(np.int32)
        if not len(blocks):
            return {}
        rows = np.empty((len(blocks), DIM), np.float32)
        shard.tables[2].pull(self._keys[split][here], blocks, np.ones(len(blocks), np.int32), rows)
        return dict(zip(blocks.tolist(), rows.astype(np.float64) / -RATE, strict=True))

    def ended(self, coordinator: Coordinator, member: int) -> None:
        """When a member ends: what it kept of its splits is lost; of one that a coordinator has not heard of yet, of any."""
        unheard = member in coordinator.clocks.unheard
        self._ended += self._open_splits if unheard else len(coordinator.work.leased_to(member))

    def answered(self, method: str, request: Any) -> None:
        """After the coordinator heard a message."""
        if method == "Coordinator.Release":
            self._ended += len(request.splits)

    def finish(self, coordinator: Coordinator, shards: list[Shard]) -> None:
        """After the last event of a job that is done."""
        if not self.kept:
            return
        lost, reported = 0, coordinator.status()["residual_splits_lost"]
        for split, applied in enumerate(self._applied):
            for shard in shards:
                self._compare(shard, split, shard.owned[self._base : self._base + KEYS], "at the end")
            given = [self._given(split, group) for group in range(self._groups)]
            rows, dense = sum(rows for _, rows, _ in given), sum(dense for _, _, dense in given)
            whole = np.array_equal(rows, applied.rows) and np.array_equal(dense, applied.dense)
            if not whole and sum(of == split for of, _ in self._sent) < 2:
                missing = (rows - applied.rows).tolist()
                raise Violation(f"F1: one worker sent all of split {split}, and {missing} of its rows is missing")
            lost += not whole
        if not lost <= reported <= self._ended:
            raise Violation(
                f"F2: {lost} splits lost what was kept of them, {reported} were reported, and workers had {self._ended} "
                "when they ended"
            )
