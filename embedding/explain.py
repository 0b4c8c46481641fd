# SPDX-License-Identifier: Apache-2.0
"""Explain: everything that a table knows of one key, as JSON-ready values.

Invariant: looking changes no value; a row that was in the spill file comes back to memory. Under the block's mutex, so that
all of it is of one instant.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.content import read_row
from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT
from oarlock.embedding.hashing import block_of_mix, key_mix
from oarlock.embedding.index import PENDING, SPILLED, VALUE, find, home
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, address_of, load_u32
from oarlock.embedding.slab import First, Layout, draw_weights, side_at, weights_at
from oarlock.proto.errors import InvalidArgument

if TYPE_CHECKING:
    from oarlock.embedding.upkeep import Upkeep


@jit
def find_word(buckets: Int, count: Int, salt: np.uint64, key: np.uint64) -> Int:
    """Return the word of a key in an index, -1 if it is not there."""
    entry = find(buckets, count, home(buckets, count, key_mix(salt, key)), key)
    if entry == 0:
        return np.int64(-1)
    return np.int64(load_u32(entry, 0))


@jit
def read_slot(
    chunks: Int, slot: Int, shape: Layout, weights: Int, state: NDArray[np.float32], counters: NDArray[np.uint32]
) -> None:
    """Copy one row to weights: float32[dim] at an address, state: float32[1, columns], counters: uint32[1, c]."""
    side = side_at(chunks, slot, shape)
    read_row(weights_at(chunks, slot, shape), side, shape, counters.shape[1], 0, weights, state, counters)


@jit
def block_of(salt: np.uint64, bits: int, key: np.uint64) -> Int:
    return block_of_mix(key_mix(salt, key), bits)


@jit
def draw_row(key: np.uint64, shape: Layout, first: First, out: Int) -> None:
    draw_weights(key, shape, first, out)


def explain_row(table: "Upkeep", key: int, tick: int | None) -> dict[str, Any]:
    """Return what ``Table.explain`` promises."""
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 1 << 64:
        raise InvalidArgument(f"key = {key!r}: give an integer from 0 to 2^64 - 1")
    spec, shape = table.spec, table.layout
    block = int(block_of(table.salt, table.bits, np.uint64(key)))
    table.stored(block)
    weights = np.empty(spec.dim, np.float32)
    state = np.empty((1, table.state_columns), np.float32)
    counters = np.empty((1, shape.counters), np.uint32)
    out: dict[str, Any] = {"table": spec.name, "key": key, "block": block}
    with table.holding(block):
        table.stored(block)
        words = table.descriptors[block]
        word = int(find_word(int(words[BUCKETS]), int(words[COUNT]), table.salt, np.uint64(key)))
        if word >= SPILLED:
            table.bring_back(block, np.array([key], np.uint64))
            out["was_in"] = "spill file"
            word = int(find_word(int(words[BUCKETS]), int(words[COUNT]), table.salt, np.uint64(key)))
        present = 0 <= word < PENDING
        if present:
            read_slot(int(words[CHUNKS]), word & VALUE, shape, address_of(weights), state, counters)
        sketch = table.blocks[block].sketch
    out["present"] = present
    if not present:
        draw_row(np.uint64(key), shape, table.first, address_of(weights))
        if spec.absent == "zeros":
            weights[:] = 0
        waited = word & VALUE if word >= PENDING else 0
        if sketch is not None:
            mix = np.array([key_mix(table.salt, np.uint64(key))], np.uint64)
            waited = int(sketch.estimate(mix)[0])
        needed = spec.admission.occurrences if spec.admission.kind in ("count", "sketch") else None
        out["admission"] = {"kind": spec.admission.kind, "occurrences": waited, "needed": needed}
        out["reads_as"] = spec.absent
    out["weights"] = weights.tolist()
    out["norm"] = float(np.sqrt(np.square(weights, dtype=np.float64).sum()))
    if present:
        out |= _row(table, word & VALUE, state[0], counters[0], tick)
    return out


def _row(table: "Upkeep", slot: int, state: Any, counters: Any, tick: int | None) -> dict[str, Any]:
    shape, spec = table.layout, table.spec

    def counter(column: int) -> int | None:
        return int(counters[column]) if column >= 0 else None

    updated = counter(shape.updated)
    out: dict[str, Any] = {
        "slot": slot,
        "occurrences": counter(shape.occurrences),
        "last_update": updated,
        "age": None if tick is None or updated is None else max(0, tick - updated),
        "state": state.tolist(),
        "state_norm": float(np.sqrt(np.square(state, dtype=np.float64).sum())),
        "row_version": counter(shape.version),
        "undo_kept": int(counters[shape.recorded]) >> 16 if shape.recorded >= 0 else 0,
    }
    eviction = spec.eviction
    standing: dict[str, Any] = {}
    if eviction.age:
        standing["age"] = {"limit": eviction.age, "now": out["age"]}
    if eviction.occurrences:
        standing["occurrences"] = {"least": eviction.occurrences, "now": out["occurrences"]}
    if eviction.norm:
        standing["norm"] = {"least": eviction.norm}
    if shape.shows >= 0:
        shows, clicks = (float(x) for x in counters[shape.shows : shape.shows + 2].view(np.float32))
        admission = spec.admission
        score = (shows - clicks) * admission.nonclick + clicks * admission.click
        out |= {"shows": shows, "clicks": clicks, "score": score}
        if eviction.score:
            standing["score"] = {"least": eviction.score, "now": score}
    if eviction.max_bytes:
        standing["budget"] = {"max_bytes": eviction.max_bytes, "order": eviction.order}
    out["eviction"] = standing
    return out
