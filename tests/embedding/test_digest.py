# SPDX-License-Identifier: Apache-2.0
"""The digest against plain Python, and what it depends on."""

from typing import Any

import numpy as np
import pytest

from oarlock.embedding.digest import Digest
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.policy import Admission
from oarlock.embedding.spec import OptimizerSpec, TableSpec
from oarlock.embedding.table import Table

M = (1 << 64) - 1


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M
    return x ^ x >> 31


def absorb(h: int, word: int) -> int:
    return mix((h ^ word) + 0x9E3779B97F4A7C15 & M)


def plain(kind: int, name: str, rows: list[tuple[int, list[list[int]]]]) -> int:
    """Return the sum of the rows' hashes; each row is a key and the words of its parts."""
    begin, total = mix(int(table_salt(name)) + kind & M), 0
    for key, parts in rows:
        lanes = []
        for lane in (0x243F6A8885A308D3, 0x13198A2E03707344):
            h = absorb(key ^ begin, lane)
            for part in parts:
                h = absorb(h, len(part))
                for word in part:
                    h = absorb(h, word)
            lanes.append(h)
        total += lanes[0] | lanes[1] << 64
    return total % (1 << 128)


def bits(values: Any) -> list[list[int]]:
    return [row.view(np.uint32).tolist() for row in np.ascontiguousarray(values)]


def content(rng: np.random.Generator, n: int, dim: int, state: int, counters: int) -> list[Any]:
    keys = rng.choice(1 << 40, n, replace=False).astype(np.uint64)
    rows = [rng.normal(size=(n, width)).astype(np.float32) for width in (dim, state)]
    return [keys, *rows, rng.integers(0, 9, (n, counters)).astype(np.uint32)]


def of(*blocks: list[Any], table: str = "t") -> int:
    found = Digest()
    for number, block in enumerate(blocks):
        waiting = block[4:] or [np.empty(0, np.uint64), np.empty(0, np.uint32), b""]
        found.add_rows(table, number, *block[:4], *waiting)
    return found.value


@pytest.mark.parametrize("shape", [(7, 3, 2, 1), (5, 1, 0, 0), (0, 4, 4, 0)])
def test_it_is_what_plain_python_says(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> None:
    block = content(rng, *shape)
    wanted = plain(
        1, "t", [(int(k), list(parts)) for k, *parts in zip(block[0], *(bits(b) for b in block[1:]), strict=True)]
    )
    assert of(block) == wanted
    found = Digest()
    found.add_dense("d", 3, np.float32([1, -2]), np.float32([0.5]))
    assert found.value == plain(2, "d", [(3, [*bits(np.float32([[1, -2]])), *bits(np.float32([[0.5]])), []])])
    assert str(found) == f"{found.value:032x}"


def test_waiting_keys_and_sketches_count(rng: np.random.Generator) -> None:
    block = content(rng, 2, 1, 0, 0)
    waits = [np.uint64([4, 9]), np.uint32([1, 3]), b""]
    added = of([*block, *waits]) - of(block)
    assert added % (1 << 128) == plain(3, "t", [(4, [[1], [], []]), (9, [[3], [], []])])
    added = of([*block, *waits[:2], b"\1\0\0\0\2"]) - of([*block, *waits])
    assert added % (1 << 128) == plain(4, "t", [(0, [[1, 2], [], []])])


def test_order_and_blocks_do_not_count_and_every_bit_does(rng: np.random.Generator) -> None:
    block = content(rng, 40, 4, 4, 2)
    known = of(block)
    order = rng.permutation(40)
    shuffled = [part[order] for part in block]
    assert of(shuffled) == known
    assert of([part[:11] for part in shuffled], [part[11:] for part in shuffled]) == known
    seen = {known, of(block, table="u"), of([part[1:] for part in block])}
    for part in range(4):
        changed = [each.copy() for each in block]
        changed[part].view(np.uint8).reshape(-1)[5] ^= 1
        seen.add(of(changed))
    # Values that change places: between two rows, two columns, weights and state.
    swapped = [each.copy() for each in block]
    swapped[1][[0, 1]] = swapped[1][[1, 0]]
    columns = [each.copy() for each in block]
    columns[1] = columns[1][:, [1, 0, 2, 3]]
    seen |= {of(swapped), of(columns), of([block[0], block[2], block[1], block[3]])}
    seen.add(of([block[0], np.concatenate(block[1:3], axis=1), block[2][:, :0], block[3]]))
    assert len(seen) == 11


def test_tables_with_the_same_rows_have_the_same_digest_however_they_came(rng: np.random.Generator) -> None:
    spec = TableSpec("t", 2, OptimizerSpec("adagrad"), blocks=1, admission=Admission("count", occurrences=2))
    keys = np.arange(50, dtype=np.uint64)
    found = []
    for order in (keys, keys[::-1].copy()):
        table = Table(spec, seed=3)
        table.adopt(0)
        whole = np.array([[0], [50]], np.int32)
        for _ in range(2):
            gradients = np.stack([order, order + 1], axis=1).astype(np.float32) / 50
            table.push(order, *whole, gradients, rate=0.1)
        table.push(np.uint64([99]), whole[0], np.int32([1]), np.ones((1, 2), np.float32), rate=0.1)
        rows = table.export_block(0)
        assert len(rows.keys) == 50
        assert len(rows.waiting) == 1
        found.append((rows.keys.tolist(), of(list(rows))))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]
