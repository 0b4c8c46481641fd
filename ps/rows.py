# SPDX-License-Identifier: Apache-2.0
"""Rows: what a shard answers to people's tools about single rows of the blocks that it owns.

Invariant: all verbs but UNDO change nothing. An undo is an operation of the blocks that it changes (the table counts it),
under the push lock as a push is, and is done once per number: the same message again gets the first answer. Called from
many threads.
"""

import hashlib
import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.content import BlockRows
from oarlock.embedding.lookup import row_bytes, rows_from, rows_of
from oarlock.embedding.make import AnyTable
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, StalePlacement, UnknownTable
from oarlock.proto.shard_pb2 import EXPLAIN, EXPORT, GET, QUARANTINE, UNDO, RowsReply, RowsRequest
from oarlock.ps.does import Undone
from oarlock.ps.request import Keys, read_keys
from oarlock.ps.shard import Shard

# Keys that one message may name: a block is held while its keys are looked up.
MAX_KEYS = 4096
# About how much of a block one page of an export holds.
PAGE_BYTES = 8 << 20
# Updates that one undo may take back; no table keeps more.
MAX_STEPS = 65535
# Undos whose answers are kept for those that are sent again.
ANSWERS_KEPT = 64
# What a number takes at most in an explanation, and what all else in it takes about.
NUMBER_BYTES = 26
FACTS_BYTES = 4096


def plain(value: Any) -> Any:
    """Return ``value`` with the floats that JSON has no form for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


class Rows:
    """Answers RowsRequests about ``shard``, which is shard ``me`` of the job."""

    def __init__(self, shard: Shard, me: int) -> None:
        self._shard = shard
        self._me = me
        self._answers: OrderedDict[int, tuple[bytes, RowsReply]] = OrderedDict()

    def answer(self, request: RowsRequest) -> RowsReply:
        verbs = {
            GET: self._get,
            EXPLAIN: self._explain,
            EXPORT: self._export,
            UNDO: self._undo,
            QUARANTINE: self._quarantine,
        }
        verb = verbs.get(request.verb)
        if verb is None:
            raise InvalidArgument(f"verb {request.verb} of rows: this shard knows {len(verbs)}, from 1 on")
        return verb(request)

    def _table(self, request: RowsRequest) -> AnyTable:
        tables = self._shard.tables
        if request.keys.table >= len(tables):
            raise UnknownTable(
                f"the message names table {request.keys.table}, this job has {len(tables)}", table=request.keys.table
            )
        return tables[request.keys.table]

    def _keys(self, request: RowsRequest) -> tuple[AnyTable, Keys]:
        """Return the message's table and keys, each of which comes once and is of a block that is owned here."""
        keys = read_keys(self._shard.layout, request.keys)
        if len(keys.keys) > MAX_KEYS:
            raise InvalidArgument(f"{len(keys.keys)} keys asked for, at most {MAX_KEYS} in one message")
        self._owns(keys.numbers)
        table = self._shard.tables[keys.table]
        table.check(keys.keys, keys.blocks, keys.counts, unique=True)
        return table, keys

    def _owns(self, numbers: NDArray[np.int32]) -> None:
        elsewhere = numbers[~self._shard.owned[numbers]]
        if len(elsewhere):
            block = int(elsewhere[0])
            raise StalePlacement(f"block {block} is not on this shard: fetch the placement", block=block)

    def _get(self, request: RowsRequest) -> RowsReply:
        table, keys = self._keys(request)
        _fits(len(keys.keys) * (4 + 4 * table.spec.dim), "rows")
        weights = np.empty((len(keys.keys), table.spec.dim), np.float32)
        table.pull(keys.keys, keys.blocks, keys.counts, weights)
        present = np.zeros(len(keys.keys), np.int32)
        at = 0
        for part in _copies(table, keys):
            run = keys.keys[at : at + part[1]]
            rows = part[0]
            order = np.argsort(run)
            where = at + order[np.searchsorted(run, rows.keys, sorter=order)]
            weights[where], present[where] = rows.weights, 1
            at += part[1]
        return RowsReply(present=pack(present), weights=pack(weights))

    def _explain(self, request: RowsRequest) -> RowsReply:
        table, keys = self._keys(request)
        width = table.spec.dim + table.state_columns
        _fits(len(keys.keys) * (NUMBER_BYTES * width + FACTS_BYTES), "explanations")
        reply = RowsReply()
        tick = max(request.tick, self._shard.step) or None
        numbers = np.repeat(keys.numbers, keys.counts)
        for key, number in zip(keys.keys.tolist(), numbers.tolist(), strict=True):
            facts = {
                **table.explain(key, tick=tick),
                "shard": self._me,
                "generation": self._shard.generation,
                "version": self._shard.operations(number),
            }
            reply.facts.append(json.dumps(plain(facts), allow_nan=False))
        return reply

    def _export(self, request: RowsRequest) -> RowsReply:
        if request.keys.keys.data or request.keys.blocks.data:
            table, keys = self._keys(request)
            _fits(len(keys.keys) * row_bytes(table), "rows")
            parts = [rows for rows, _ in _copies(table, keys)]
            return _whole([np.concatenate(columns) for columns in zip(*(part[:4] for part in parts), strict=True)])
        table = self._table(request)
        if request.block >= table.spec.blocks:
            raise Malformed(f"table {table.spec.name}: block {request.block} is outside 0 to {table.spec.blocks - 1}")
        number = self._shard.layout.table_base[request.keys.table] + request.block
        self._owns(np.array([number], np.int32))
        most = max(1, PAGE_BYTES // row_bytes(table))
        rows, more = rows_from(table, request.block, request.least, most)
        reply = _whole(list(rows[:4]))
        if more:
            reply.more, reply.next = True, int(rows.keys[-1]) + 1
        return reply

    def _undo(self, request: RowsRequest) -> RowsReply:
        if not request.number:
            raise InvalidArgument("an undo needs a number, by which it is known when it is sent again")
        if not 1 <= request.steps <= MAX_STEPS:
            raise InvalidArgument(f"steps = {request.steps}: give 1 to {MAX_STEPS}")
        content = hashlib.sha256(b"%d " % request.steps + request.keys.SerializeToString(deterministic=True)).digest()
        shard = self._shard
        if shard.staged is not None and shard.staged.all_blocks:
            raise InvalidArgument(
                "mode sync and undo contradict each other: its rows are those of every job with the same data and settings"
            )
        with shard.push_lock:
            before = self._answers.get(request.number)
            if before is not None:
                if before[0] != content:
                    raise InvalidArgument(f"undo {request.number} was another one: draw a new number")
                return before[1]
            # All of the message is checked before any of it is undone.
            table, keys = self._keys(request)
            shard.feed.note(keys)
            done = table.undo(keys.keys, steps=request.steps)
            if shard.told is not None:
                changed = np.maximum.reduceat(done, np.cumsum(keys.counts) - keys.counts) > 0 if len(done) else done > 0
                if changed.any():
                    shard.did(keys.numbers[changed], Undone(keys.only(changed)[0], request.steps))
            shard.counters["rows_undone"] += int((done > 0).sum())
            reply = RowsReply(undone=pack(done))
            self._answers[request.number] = (content, reply)
            if len(self._answers) > ANSWERS_KEPT:
                self._answers.popitem(last=False)
        return reply

    def _quarantine(self, request: RowsRequest) -> RowsReply:
        table = self._table(request)
        return RowsReply(refused=table.refused, keys=pack(np.unique(table.refused_keys())))


def _copies(table: AnyTable, keys: Keys) -> list[tuple[BlockRows, int]]:
    """Return of each block of ``keys`` the rows that are there, and how many keys asked for them."""
    out, at = [], 0
    for block, count in zip(keys.blocks.tolist(), keys.counts.tolist(), strict=True):
        out.append((rows_of(table, block, keys.keys[at : at + count]), count))
        at += count
    return out


def _whole(columns: list[NDArray[Any]]) -> RowsReply:
    keys, weights, state, counters = map(pack, columns)
    return RowsReply(keys=keys, weights=weights, state=state, counters=counters)


def _fits(size: int, what: str) -> None:
    """Raise OutOfMemory before memory is taken: a small request may ask for an enormous answer."""
    if size > MAX_MESSAGE_BYTES:
        raise OutOfMemory(
            f"the {what} asked for are about {size} bytes, over the limit of {MAX_MESSAGE_BYTES} bytes in one message: "
            "ask for fewer at once"
        )
