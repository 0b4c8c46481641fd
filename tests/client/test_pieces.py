# SPDX-License-Identifier: Apache-2.0
"""Numbering of blocks, and requests cut by owner: nothing lost, nothing twice, nothing over the limit."""

import dataclasses
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import rig
from hypothesis import given

from oarlock.client.layout import Layout
from oarlock.client.pieces import by_owner, dense_by_owner
from oarlock.client.pull import cut_pull
from oarlock.client.push import PushIdentity, RowGradients, cut_push, recut_push
from oarlock.client.router import ShardAddress, make_routes
from oarlock.embedding.keys import KeySet
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto.arrays import unpack
from oarlock.proto.bulk import inlined
from oarlock.proto.errors import Malformed, OutOfMemory, UnknownTable

LAYOUT = Layout(rig.spec_of().tables, rig.spec_of().dense)


def test_blocks_are_numbered_tables_first_in_the_order_of_the_spec():
    assert (LAYOUT.table_base, LAYOUT.dense_base, LAYOUT.blocks, LAYOUT.dense_size) == ([0, 8], 12, 17, 14)
    assert [LAYOUT.name(n) for n in range(17)] == [
        *(("user", b) for b in range(8)),
        *(("item", b) for b in range(4)),
        *(("w", b) for b in range(3)),
        *(("b", b) for b in range(2)),
    ]
    blocks = [(b.parameter, b.block, b.start, b.length, b.offset) for b in LAYOUT.dense_blocks]
    assert blocks == [(0, 0, 0, 4, 0), (0, 1, 4, 4, 4), (0, 2, 8, 1, 8), (1, 0, 0, 3, 9), (1, 1, 3, 2, 12)]
    assert LAYOUT.table_index == {"user": 0, "item": 1}


def test_a_layout_may_lack_tables_or_dense_parameters():
    only_dense, only_tables = Layout((), LAYOUT.dense), Layout(LAYOUT.tables, ())
    assert [only_dense.name(n) for n in range(5)] == [("w", 0), ("w", 1), ("w", 2), ("b", 0), ("b", 1)]
    assert (only_tables.blocks, only_tables.dense_base, only_tables.dense_size) == (12, 12, 0)


@st.composite
def requests(draw):
    """(blocks, counts, owners, wanted) of one table."""
    m = draw(st.integers(0, 12))
    blocks = np.array(draw(st.permutations(range(16)))[:m], np.int32)
    counts = np.array(draw(st.lists(st.integers(1, 9), min_size=m, max_size=m)), np.int32)
    owners = np.array(draw(st.lists(st.integers(0, 3), min_size=m, max_size=m)), np.int32)
    wanted = draw(st.none() | st.lists(st.booleans(), min_size=m, max_size=m).map(lambda w: np.array(w, np.bool_)))
    return blocks, counts, owners, wanted


@given(requests(), st.integers(9 * 20 + 8, 800))
def test_pieces_are_a_partition_by_owner(request_, limit):
    blocks, counts, owners, wanted = request_
    ends = np.cumsum(counts)
    keys = np.arange(int(counts.sum()), dtype=np.uint64)
    found = list(by_owner(5, blocks, counts, owners, name="t", row_bytes=12, wanted=wanted, limit=limit))
    chosen = np.ones(len(blocks), np.bool_) if wanted is None else wanted
    seen = []
    for shard, piece in found:
        message = piece.keys(keys)
        got = unpack(message.keys, np.uint64, "keys")
        at = [list(blocks).index(b) for b in piece.blocks]
        # The owner's own blocks, in their order, with all of their keys in their order.
        assert at == sorted(at)
        assert all(owners[i] == shard for i in at)
        assert got.tolist() == [k for i in at for k in range(ends[i] - counts[i], ends[i])]
        assert np.array_equal(unpack(message.blocks, np.int32, "blocks"), blocks[at])
        assert np.array_equal(unpack(message.counts, np.int32, "counts"), counts[at])
        assert message.table == piece.table == 5
        assert piece.size == len(got)
        assert piece.volume == len(got) * 20 + len(at) * 8 <= limit
        seen += at
    assert sorted(seen) == np.flatnonzero(chosen).tolist()
    # No more messages than needed: two neighbours of one owner never fit into one.
    for (shard, first), (after, second) in pairwise(found):
        assert shard != after or first.volume + second.blocks[:1].size * 8 + int(second.counts[0]) * 20 > limit


@given(requests(), st.integers(24, 60))
def test_dense_pieces_are_a_partition_by_owner(request_, limit):
    _, _, owners, _ = request_
    numbers = np.arange(12, 12 + min(5, len(owners)), dtype=np.int32)
    owners = owners[: len(numbers)]
    seen = []
    for shard, positions, volume in dense_by_owner(LAYOUT, numbers, owners, limit=limit):
        assert volume == sum(LAYOUT.dense_blocks[numbers[p] - 12].length * 4 + 8 for p in positions) <= limit
        assert all(owners[p] == shard for p in positions)
        seen += positions.tolist()
    assert sorted(seen) == list(range(len(numbers)))


def test_a_block_over_the_limit_is_named():
    one = (np.array([3, 6], np.int32), np.array([2, 9], np.int32), np.array([0, 0], np.int32))
    with pytest.raises(OutOfMemory, match=r"table user, block 6 is 188 bytes, over the 187 .*batch_rows"):
        list(by_owner(0, *one, name="user", row_bytes=12, limit=187))
    numbers = np.arange(12, 17, dtype=np.int32)
    with pytest.raises(OutOfMemory, match=r"dense parameter w, block 0 is 24 bytes, over the 23 .*slice"):
        list(dense_by_owner(LAYOUT, numbers, np.zeros(5, np.int32), limit=23))


def routes_of(owners):
    return make_routes(LAYOUT, 1, np.array(owners, np.int32), {s: ShardAddress(s, f"s{s}", 100 + s) for s in range(3)})


def gradients_of(routes, rng):
    out = {}
    for table in LAYOUT.tables:
        keyset = rig.group_keys(LAYOUT, routes, table.name, rng.integers(0, 1 << 40, 60))
        values = rng.random((len(keyset.keys), table.dim), np.float32)
        out[table.name] = RowGradients(keyset, values, 0.5)
    return out


def counted(gradients, rng):
    """Return the gradients with occurrences and clicks for the first table, occurrences alone for the second."""
    out = {}
    for name, part in gradients.items():
        n = len(part.keys.keys)
        occurrences = rng.integers(1, 1 << 32, n, np.uint32)
        clicks = None if out else rng.random(n, np.float32)
        out[name] = RowGradients(part.keys, part.gradients, part.rate, occurrences, clicks)
    return out


def counts_of(messages):
    """Return {(table, key): (occurrence, click or None)} of push messages."""
    found = {}
    for message in messages:
        for part in message.request.tables:
            keys = unpack(part.keys.keys, np.uint64, "keys").tolist()
            occurrences = unpack(part.occurrences, np.uint32, "o").tolist()
            clicks = unpack(part.clicks, np.float32, "c").tolist() or [None] * len(keys)
            for key, *both in zip(keys, occurrences, clicks, strict=True):
                assert (part.keys.table, key) not in found
                found[part.keys.table, key] = tuple(both)
    return found


def contents(messages):
    """Return {(shard, table, block): {key: gradient}} and {(shard, dense block): values} of push messages."""
    found = {}
    for message in messages:
        for part in message.request.tables:
            keys = unpack(part.keys.keys, np.uint64, "keys").tolist()
            dim = LAYOUT.tables[part.keys.table].dim
            values = unpack(part.gradients, np.float32, "g", dims=2, columns=dim).tolist()
            blocks, counts = (unpack(a, np.int32, "b").tolist() for a in (part.keys.blocks, part.keys.counts))
            at = 0
            for block, count in zip(blocks, counts, strict=True):
                name = (message.shard.id, part.keys.table, block)
                assert name not in found
                found[name] = dict(zip(keys[at : at + count], values[at : at + count], strict=True))
                at += count
            assert part.rate == 0.5
        for part in message.request.dense:
            values = unpack(part.gradients, np.float32, "g").tolist()
            for number in unpack(part.blocks, np.int32, "b").tolist():
                length = LAYOUT.dense_blocks[number - 12].length
                assert (message.shard.id, number) not in found
                found[message.shard.id, number], values = values[:length], values[length:]
            assert not values
            assert part.rate == 0.25
    return found


@pytest.mark.parametrize("limit", [1 << 20, 900])
def test_occurrences_and_clicks_go_with_their_keys(limit, rng):
    routes = routes_of(rng.integers(0, 3, 17))
    gradients = counted(gradients_of(routes, rng), rng)
    messages = cut_push(LAYOUT, routes, PushIdentity(7, 3), gradients, None, 0.25, limit=limit)
    assert all(inlined(m.bulk).ByteSize() < limit + 100 for m in messages)
    wanted = {}
    for number, table in enumerate(LAYOUT.tables):
        part = gradients[table.name]
        clicks = [None] * len(part.keys.keys) if part.clicks is None else part.clicks.tolist()
        for key, *both in zip(part.keys.keys.tolist(), part.occurrences.tolist(), clicks, strict=True):
            wanted[number, key] = tuple(both)
    assert counts_of(messages) == wanted
    assert contents(messages) == contents(cut_push(LAYOUT, routes, PushIdentity(7, 3), gradients, None, 0.25))
    for part in gradients.values():
        part.occurrences[:] = 0
    left = [(m, m.numbers[rng.random(len(m.numbers)) < 0.6]) for m in messages]
    again = recut_push(LAYOUT, routes_of(rng.integers(0, 3, 17)), left)
    some = counts_of(again)
    assert 0 < len(some) < len(wanted)
    assert some.items() <= wanted.items()
    assert len(some) == sum(len(part) for part in contents(again).values())


def test_a_push_without_occurrences_is_as_it_was(rng):
    routes = routes_of([0] * 17)
    (message,) = cut_push(LAYOUT, routes, PushIdentity(7, 3), gradients_of(routes, rng), None, 0.25)
    assert not any(part.HasField("occurrences") or part.HasField("clicks") for part in message.request.tables)
    (again,) = recut_push(LAYOUT, routes, [(message, message.numbers)])
    assert again.request == message.request


@pytest.mark.parametrize("what", ["occurrences", "clicks"])
def test_occurrences_of_another_number_of_keys_are_refused(what, rng):
    routes = routes_of([0] * 17)
    gradients = counted(gradients_of(routes, rng), rng)
    user = gradients["user"]
    short = dataclasses.replace(user, **{what: getattr(user, what)[:-1]})
    with pytest.raises(Malformed, match=f"table user: {what} have shape"):
        cut_push(LAYOUT, routes, PushIdentity(7, 3), {"user": short}, None, 0.25)


@pytest.mark.parametrize("limit", [1 << 20, 700, 550])
def test_a_push_is_cut_by_owner_within_the_limit(limit, rng):
    owners = rng.integers(0, 3, 17)
    routes = routes_of(owners)
    gradients = gradients_of(routes, rng)
    dense = rng.random(14, np.float32)
    messages = cut_push(LAYOUT, routes, PushIdentity(7, 3), gradients, dense, 0.25, limit=limit)
    # The header and the lengths of fields are what the megabyte beside the limit is for.
    assert all(inlined(m.bulk).ByteSize() < limit + 100 for m in messages)
    assert all((m.request.split, m.request.group) == (7, 3) for m in messages)
    assert len(messages) == 3 or limit < 1 << 20
    found = contents(messages)
    numbers = [n for m in messages for n in m.numbers.tolist()]
    assert len(numbers) == len(set(numbers)) == len(found)
    rows = {(LAYOUT.tables[t].name, k): v for (_, t, _), part in rows_of(found).items() for k, v in part.items()}
    wanted = {
        (name, int(k)): v
        for name, part in gradients.items()
        for k, v in zip(part.keys.keys, part.gradients.tolist(), strict=True)
    }
    assert rows == wanted
    assert all(owners[LAYOUT.table_base[t] + b] == s for s, t, b in rows_of(found))
    for (shard, number), values in dense_of(found).items():
        block = LAYOUT.dense_blocks[number - 12]
        assert owners[number] == shard
        assert values == dense[block.offset : block.offset + block.length].tolist()
    assert len(dense_of(found)) == 5


def rows_of(found):
    return {k: v for k, v in found.items() if len(k) == 3}


def dense_of(found):
    return {k: v for k, v in found.items() if len(k) == 2}


@pytest.mark.parametrize("limit", [1 << 20, 550])
def test_what_is_left_of_a_push_is_cut_out_of_its_own_bytes(limit, rng):
    routes = routes_of(rng.integers(0, 3, 17))
    gradients = gradients_of(routes, rng)
    dense = rng.random(14, np.float32)
    messages = cut_push(LAYOUT, routes, PushIdentity(7, 3), gradients, dense, 0.25, limit=limit)
    before = contents(messages)
    for part in gradients.values():
        part.gradients[:] = -1
        part.keys.keys[:] = 0
    dense[:] = -1
    owners = rng.integers(0, 3, 17)
    left = [(m, m.numbers[rng.random(len(m.numbers)) < 0.6]) for m in messages]
    again = recut_push(LAYOUT, routes_of(owners), left)
    assert all((m.request.split, m.request.group) == (7, 3) for m in again)
    blocks = {int(n) for _, numbers in left for n in numbers}
    assert 0 < len(blocks) < len(before)
    number = lambda name: name[1] if len(name) == 2 else LAYOUT.table_base[name[1]] + name[2]  # noqa: E731
    assert contents(again) == {
        (int(owners[number(name)]), *name[1:]): part for name, part in before.items() if number(name) in blocks
    }
    assert sorted(n for m in again for n in m.numbers.tolist()) == sorted(blocks)


@pytest.mark.parametrize("limit", [1 << 20, 700, 550])
def test_a_pull_is_cut_by_owner_within_the_limit(limit, rng):
    owners = rng.integers(0, 3, 17)
    routes = routes_of(owners)
    keys = {name: part.keys for name, part in gradients_of(routes, rng).items()}
    wanted = rng.random(17) < 0.7
    for chosen in (None, wanted):
        messages = cut_pull(LAYOUT, routes, keys, np.arange(12, 17, dtype=np.int32), chosen, limit=limit)
        numbers = [n for m in messages for n in m.numbers.tolist()]
        touched = [LAYOUT.table_base[LAYOUT.table_index[t]] + int(b) for t, k in keys.items() for b in k.blocks]
        everything = {*touched, *range(12, 17)}
        assert sorted(numbers) == sorted(n for n in everything if chosen is None or chosen[n])
        for message in messages:
            assert all(owners[n] == message.shard.id for n in message.numbers)
            dense = sum(LAYOUT.dense_blocks[n - 12].length * 4 + 8 for n in message.dense.tolist())
            assert message.volume == sum(p.volume for _, p in message.pieces) + dense <= limit


def test_two_tables_that_fit_alone_but_not_together_go_apart(rng):
    routes = routes_of([0] * 17)
    gradients = gradients_of(routes, rng)
    alone = [
        sum(p.volume for m in cut_pull(LAYOUT, routes, {n: g.keys}, np.empty(0, np.int32)) for _, p in m.pieces)
        for n, g in gradients.items()
    ]
    limit = max(alone) + 10
    assert len(cut_push(LAYOUT, routes, PushIdentity(0, 0), gradients, None, 0.0, limit=limit)) == 2
    assert len(cut_push(LAYOUT, routes, PushIdentity(0, 0), gradients, None, 0.0, limit=sum(alone))) == 1


def test_nothing_to_send_makes_no_message():
    routes = routes_of([0] * 17)
    empty = KeySet(np.empty(0, np.uint64), *(np.empty(0, np.int32) for _ in range(3)))
    nothing = {"user": RowGradients(empty, np.empty((0, 2), np.float32), 0.5)}
    assert cut_push(LAYOUT, routes, PushIdentity(0, 0), nothing, None, 0.0) == []
    assert cut_push(LAYOUT, routes, PushIdentity(0, 0), {}, None, 0.0) == []
    assert cut_pull(LAYOUT, routes, {"user": empty}, np.empty(0, np.int32)) == []
    assert len(cut_push(LAYOUT, routes, PushIdentity(0, 0), {}, np.zeros(14, np.float32), 0.25)) == 1
    without = Layout(LAYOUT.tables, ())
    assert (
        cut_push(
            without,
            make_routes(without, 1, np.zeros(12, np.int32), routes.shards),
            PushIdentity(0, 0),
            {},
            np.zeros(0, np.float32),
            0.0,
        )
        == []
    )


def test_a_table_that_the_job_has_not_is_named():
    with pytest.raises(UnknownTable, match="no table 'users'; it has: user, item"):
        cut_pull(LAYOUT, routes_of([0] * 17), {"users": None}, np.empty(0, np.int32))


def test_large_numbers_do_not_overflow():
    """Counts near 2^31 in one request: sums and bytes are reckoned in 64 bits."""
    counts = np.array([1 << 30, 1 << 30, 1 << 30], np.int32)
    blocks = np.arange(3, dtype=np.int32)
    pieces = list(by_owner(0, blocks, counts, np.zeros(3, np.int32), name="t", row_bytes=4 * 65536, limit=1 << 60))
    assert [(p.rows, p.volume) for _, p in pieces] == [(slice(0, 3 << 30), (3 << 30) * (4 * 65536 + 8) + 24)]
    scattered = list(by_owner(0, blocks, counts, np.array([0, 1, 0], np.int32), name="t", row_bytes=4, limit=(1 << 34)))
    assert [p.rows for _, p in scattered] == [slice(0, 1 << 30), slice(2 << 30, 3 << 30), slice(1 << 30, 2 << 30)]


def test_names_are_those_of_the_specs():
    other = Layout((TableSpec("t", 4, blocks=2),), (DenseSpec("d", (7,), slice=7),))
    assert [other.name(n) for n in range(3)] == [("t", 0), ("t", 1), ("d", 0)]
    with pytest.raises(IndexError):
        other.name(3)
