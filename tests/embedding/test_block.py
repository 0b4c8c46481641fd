# SPDX-License-Identifier: Apache-2.0
"""How blocks grow: rows stay where they are, freed slots come first, and no memory is an error that changes nothing."""

import embedding_reference as reference
import numpy as np
import pytest
import table_reference

from oarlock.embedding import memory
from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, FREE_ROWS, NEXT, SLOT_ROOM
from oarlock.embedding.explain import find_word
from oarlock.embedding.index import PENDING
from oarlock.embedding.jit import jit
from oarlock.embedding.slab import side_at, weights_at
from oarlock.embedding.spec import Eviction, Guard, OptimizerSpec, TableSpec
from oarlock.proto.errors import OutOfMemory

MANY = reference.MANY


@jit
def where_is(chunks, slot, shape):
    return weights_at(chunks, slot, shape), side_at(chunks, slot, shape)


def places(table, keys):
    """Return where weights and sides of keys lie."""
    out = []
    for key in keys:
        words = table.descriptors[reference.block("t", table.bits, key)]
        slot = find_word(int(words[BUCKETS]), int(words[COUNT]), table.salt, np.uint64(key))
        assert 0 <= slot < PENDING
        out.append(where_is(int(words[CHUNKS]), slot, table.layout))
    return out


@pytest.mark.parametrize("dim", [1, 3, 16])
def test_rows_stay_where_they_are_and_keep_their_values_while_a_block_grows(dim):
    spec = TableSpec("t", dim, OptimizerSpec("adagrad"), blocks=2, guard=Guard(undo=1))
    table = table_reference.stored(spec)
    first = list(range(100))
    table_reference.push(table, first)
    before, rows = places(table, first), table_reference.pull(table, first)[0]
    sizes = set()
    for start in range(100, 10 * MANY, MANY):
        table_reference.push(table, range(start, start + MANY))
        sizes.add(int(table.descriptors[0, COUNT]))
        assert places(table, first) == before
    assert len(sizes) > 4
    assert len(table.blocks[0]._chunks) > (8 if reference.JIT else 3)  # the chunk table itself has grown too
    assert table_reference.pull(table, first)[0].tobytes() == rows.tobytes()
    keys = list(range(table.rows))
    assert len(set(places(table, keys))) == len(keys)


def test_slots_of_rows_that_left_are_used_again_before_any_new_one():
    table = table_reference.stored(TableSpec("t", 5, blocks=1, eviction=Eviction(age=1), dtype="int8"))
    table_reference.push(table, range(200))
    size, taken = table.nbytes, int(table.descriptors[0, NEXT])
    for turn in range(1, 4):
        assert table.sweep(0, tick=1 + 10 * turn)[:2] == (200, True)
        assert (table.rows, int(table.descriptors[0, FREE_ROWS])) == (0, 200)
        keys = range(1000 * turn, 1000 * turn + 200)
        table_reference.push(table, keys, step=1 + 10 * turn)
        assert (table.nbytes, int(table.descriptors[0, NEXT])) == (size, taken)
        assert len(set(places(table, keys))) == 200
        model = table_reference.Model(table.spec, 7)
        for key in keys:
            model.push(key, np.ones(5, np.float32), 0.125, 1 + 10 * turn)
        assert table_reference.content(table)[0] == model.content()


def test_a_block_takes_little_more_memory_than_its_rows():
    table = table_reference.stored(TableSpec("t", 16, OptimizerSpec("adagrad"), blocks=1))
    assert table.blocks[0].nbytes < 512
    table_reference.push(table, range(10))
    assert table.blocks[0].nbytes < 4096
    table_reference.push(table, range(20 * MANY))
    assert not reference.JIT or table.blocks[0].nbytes < 1.5 * 20 * MANY * (128 + 16)


@pytest.mark.parametrize("what", ["take", "indexes"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_no_memory_in_the_middle_of_a_push_leaves_the_blocks_before_it_done_and_the_others_untouched(
    monkeypatch, what, after
):
    spec = TableSpec("t", 2, OptimizerSpec("adagrad"), blocks=16)
    table, model = table_reference.stored(spec), table_reference.Model(spec, 7)
    keys, blocks, counts, _ = table_reference.group("t", 4, range(700), set(range(16)))
    gradients = np.ones((700, 2), np.float32)
    for part in (slice(None), slice(None, None, 3)):
        few = keys[::12][part]
        table_reference.push(table, few)
        for key in few.tolist():
            model.push(key, np.ones(2, np.float32), 0.125, 1)
    assert table_reference.content(table)[0] == model.content()
    calls = []
    owner = memory.Arena if what == "take" else memory.IndexMemory
    real = owner.take

    def refuse(self, *arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise MemoryError("none left")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "take", refuse)
        with pytest.raises(OutOfMemory, match="add shards") as caught:
            table.push(keys, blocks, counts, gradients, rate=0.125)
    done = caught.value.details["groups"]
    assert 0 <= done < len(blocks)
    assert done > 0 if after == 5 else done <= after
    for key in keys[: counts[:done].sum()].tolist():
        model.push(key, np.ones(2, np.float32), 0.125, 1)
    assert table_reference.content(table)[0] == model.content()
    # What is left can be sent again.
    rest = counts[:done].sum()
    table.push(keys[rest:], blocks[done:], counts[done:], gradients[rest:], rate=0.125)
    for key in keys[rest:].tolist():
        model.push(key, np.ones(2, np.float32), 0.125, 1)
    assert table_reference.content(table)[0] == model.content()


def test_no_memory_for_an_import_leaves_the_block_as_it_was(monkeypatch):
    table = table_reference.stored(TableSpec("t", 2, blocks=1))
    table_reference.push(table, range(100))
    before, used, content = table_reference.content(table), table.arena.used, table.export_block(0)
    for owner in (memory.Arena, memory.IndexMemory):
        real, calls = owner.take, []

        def refuse(self, *arguments, real=real, calls=calls):
            calls.append(arguments)
            if len(calls) > 1:
                raise MemoryError
            return real(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, "take", refuse)
            with pytest.raises(OutOfMemory):
                table.import_block(0, content)
        assert table_reference.content(table) == before
        assert (table.arena.used, int(table.descriptors[0, SLOT_ROOM])) == (used, 128)
