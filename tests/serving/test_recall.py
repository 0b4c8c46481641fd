# SPDX-License-Identifier: Apache-2.0
"""Nearest rows of a served model: by the clients, in step with cuts and with rows between them, and what is refused."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving_rig

from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import pack
from oarlock.proto.errors import InvalidArgument, Malformed, UnknownTable, VersionMismatch
from oarlock.proto.serving_pb2 import NearestRequest
from oarlock.serving import AsyncClient, Client
from oarlock.serving.nearest_wire import MAX_NEAREST, MAX_VECTORS
from oarlock.serving.recall import RecallSpec, read_recall
from oarlock.serving.snapshot import Version
from oarlock.serving.swap import Serving

ITEM = RecallSpec("item", ann=False)
USER = RecallSpec("user", "cosine", (1, 3), ann=False)


@pytest.fixture
def serving(model: Any) -> Serving:
    made = Serving(model.store, recall=[ITEM, USER])
    made.load()
    return made


def ones(n: int = 16) -> Any:
    return np.ones((1, n), np.float32)


def test_clients_ask_for_the_nearest_rows(model: Any, serving: Serving, serve: Callable[..., Any]) -> None:
    _, address = serve(serving)
    # Rows of the item table are all alike: that with the largest key modulo 1000 is the first.
    keys = sorted(model.keys.tolist(), key=lambda key: -(key % 1000))
    with Client(address) as client:
        found = client.nearest("item", ones()[0], 5)
        assert found.keys.tolist() == [keys[:5]]
        assert found.scores.tolist() == [[16.0 * (1000 + key % 1000) for key in keys[:5]]]
        assert found.counts.tolist() == [5]
        assert found.version[:2] == (0, 1)
        assert found.version[2] > 0
        assert client.nearest("item", ones().repeat(3, 0), 2, exact=True).keys.tolist() == [keys[:2]] * 3
        found = client.nearest("item", -ones(), 3, among=[*keys[3:6], 1], without=[keys[5]])
        assert found.counts.tolist() == [2]
        assert found.keys.tolist() == [[keys[4], keys[3], 0]]
        assert client.nearest("item", ones(), 3, among=[]).counts.tolist() == [0]
        # The cosine of all is the same.
        assert np.allclose(client.nearest("user", ones(2), 300).scores[0, :200], 1)
        for arguments, words in (
            (("film", ones()), "of these: item, user"),
            (("item", ones(4)), "have 16 values"),
            (("item", ones() * np.nan), "not a finite number"),
            (("item", ones(), 0), "k = 0"),
            (("item", ones(), MAX_NEAREST + 1), "give an integer from 1 to"),
            (("item", "abc"), "one vector"),
            (("item", np.ones((MAX_VECTORS + 1, 16), np.float32)), "ask in parts"),
            (("item", np.ones((0, 16), np.float32)), "0 vectors"),
        ):
            with pytest.raises((InvalidArgument, UnknownTable), match=words):
                client.nearest(*arguments)
        with pytest.raises(InvalidArgument, match="keys of a filter of item"):
            client.nearest("item", ones(), among=[-1])

    async def ask() -> Any:
        async with AsyncClient(address) as other:
            return await other.nearest("item", ones(), 2, without=[keys[0]])

    assert asyncio.run(ask()).keys.tolist() == [keys[1:3]]


def test_a_request_that_lies_is_refused(serving: Serving, serve: Callable[..., Any]) -> None:
    service, _ = serve(serving, max_keys=10)
    good = {"table": "item", "vectors": pack(ones()), "k": 1}
    for changed, words in (
        ({"k": 0}, "k = 0"),
        ({"vectors": pack(np.ones(16, np.float32))}, "dimensions"),
        ({"vectors": pack(np.ones((1, 16), np.int32))}, "dtype"),
        ({"among": pack(np.arange(11, dtype=np.uint64))}, "filters of 11 keys"),
        ({"among": pack(np.arange(3, dtype=np.float32))}, "dtype"),
        ({"protocol": 99}, "protocol 99"),
    ):
        with pytest.raises((InvalidArgument, Malformed, VersionMismatch), match=words):
            service.nearest(NearestRequest(**{**good, **changed}))
    assert service.nearest(NearestRequest(**good)).counts == [1]


def test_it_is_in_step_with_cuts(model: Any, serving: Serving) -> None:
    index = serving.recall.indexes["user"]
    first = model.store.load_manifest(1)
    # Blocks of the user table are shared, of the item table all rows change, which is much.
    item = serving.recall.indexes["item"]
    model.cut(2, same=first)
    assert serving.look()
    assert serving.recall.indexes["user"] is index
    assert serving.recall.indexes["item"] is not item
    found, version = serving.recall.nearest("item", ones(), 1)
    assert version.cut == 2
    assert found.scores[0, 0] == 16 * (2000 + 206)
    assert serving.recall.nearest("user", ones(2), 1)[1].cut == 2
    # Few rows change: in place.
    item = serving.recall.indexes["item"]
    third(model)
    assert serving.look()
    assert serving.recall.indexes["item"] is item
    found, version = serving.recall.nearest("item", ones(), 200)
    assert (version.cut, found.counts[0], item.rows) == (3, 199, 199)
    assert found.scores[0, 0] == 16 * 9999
    assert serving.roll_back(2).version.cut == 2
    found, version = serving.recall.nearest("item", ones(), 300)
    assert (version.cut, found.counts[0], found.scores[0, 0]) == (2, 200, 16 * (2000 + 206))


def third(model: Any) -> None:
    """Cut 3: as cut 2, but a row of the item table is gone and another one is 9999."""
    second = model.store.load_manifest(2)
    entries = []
    for entry in second.blocks:
        if (entry.name, entry.block) == ("item", 1):
            image = model.store.load_block(second, entry)
            weights = image.weights[1:].copy()
            weights[0] = 9999
            image = replace(
                image, keys=image.keys[1:], weights=weights, state=image.state[1:], counters=image.counters[1:]
            )
            entry = model.store.write_block(3, image)
        entries.append(entry)
    model.commit(3, entries)


def test_it_is_in_step_with_rows_between_cuts(model: Any, serving: Serving) -> None:
    recall = serving.recall
    keys = np.array([9, 10**6], np.uint64)
    later = Version(0, 1, 5.0)
    recall.update("item", keys, np.full((2, 16), 5000, np.float32), version=later)
    recall.update("user", keys, np.array([[9, 0, 1, 9]] * 2, np.float32))
    recall.remove("item", model.keys[:100])
    recall.update("film", keys, np.zeros((2, 1), np.float32))
    recall.remove("film", keys)
    found, version = recall.nearest("item", ones(), 300)
    assert version is later
    # Key 9 was one of those that went.
    assert found.keys[0, 0] == 10**6
    assert found.counts[0] == 101
    found, _ = recall.nearest("user", np.array([[0, 1]], np.float32), 2)
    assert sorted(found.keys[0].tolist()) == [9, 10**6]
    # The next cut knows nothing of them.
    model.cut(2, same=model.store.load_manifest(1))
    serving.look()
    found, _ = recall.nearest("item", ones(), 300)
    assert found.counts[0] == 200
    found, _ = recall.nearest("user", np.array([[0, 1]], np.float32), 300)
    assert found.counts[0] == 200
    assert np.allclose(found.scores[0, :200], 2**-0.5)


def test_what_is_to_be_indexed_is_read(model: Any) -> None:
    assert read_recall("item") == RecallSpec("item")
    assert read_recall("item:cosine:0-8:exact") == RecallSpec("item", "cosine", (0, 8), False)
    assert read_recall("item:exact") == RecallSpec("item", ann=False)
    for wrong in ("", "item:near", "item:cosine:8-8", "item:cosine:a-b", "item:cosine:0-8:fast"):
        with pytest.raises(InvalidArgument):
            read_recall(wrong)
    with pytest.raises(InvalidArgument, match="twice"):
        Serving(model.store, recall=[ITEM, ITEM])
    with pytest.raises(UnknownTable, match="no table 'film'"):
        Serving(model.store, recall=[RecallSpec("film", ann=False)]).load()
    with pytest.raises(InvalidArgument, match="it has 16"):
        Serving(model.store, recall=[RecallSpec("item", "inner", (0, 17), False)]).load()
    bare = Serving(model.store)
    bare.load()
    with pytest.raises(UnknownTable, match="--recall TABLE"):
        bare.recall.nearest("item", ones(), 1)


def test_an_empty_table_has_no_nearest_rows(tmp_path: Path) -> None:
    empty = serving_rig.Model(tmp_path / "checkpoints")
    empty.keys = empty.keys[:0]
    empty.cut(1)
    serving = Serving(empty.store, recall=[ITEM])
    serving.load()
    assert serving.recall.nearest("item", ones(), 5)[0].counts.tolist() == [0]


def test_answers_are_of_one_cut_while_cuts_are_swapped(model: Any, serving: Serving) -> None:
    over, wrong, cuts = threading.Event(), [], set()
    most = max(model.keys.tolist(), key=lambda key: key % 1000)

    def ask() -> None:
        while not over.is_set():
            found, version = serving.recall.nearest("item", ones(), 200)
            cuts.add(version.cut)
            want = np.sort(16 * serving_rig.value_of(version.cut, model.keys))[::-1]
            if found.keys[0, 0] != most or found.scores[0].tolist() != want.tolist():
                wrong.append(version.cut)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for cut in range(2, 12):
        model.cut(cut)
        assert serving.look()
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cuts


def test_an_index_of_a_served_table_finds_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    spec = TableSpec("item", 8, blocks=4)
    made = serving_rig.Model(tmp_path / "checkpoints", specs=(spec,))
    made.keys = np.arange(12_000, dtype=np.uint64)
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (12_000, 8)).astype(np.float32)
    images = made.images

    def with_rows(spec: TableSpec, cut: int) -> list[Any]:
        return [replace(image, weights=rows[image.keys] * np.float32(cut)) for image in images(spec, cut)]

    made.images = with_rows
    made.cut(1)
    serving = Serving(made.store, recall=[RecallSpec("item", "cosine")])
    serving.load()
    index = serving.recall.indexes["item"]
    assert index.probes
    asked = rows[:100]
    found, _ = serving.recall.nearest("item", asked, 10)
    truth, _ = serving.recall.nearest("item", asked, 10, exact=True)
    assert (found.keys[:, 0] == np.arange(100)).mean() >= 0.95
    assert (found.keys == truth.keys).mean() >= 0.9
    # All rows are twice as long: that is another cut, but not another direction.
    made.cut(2)
    assert serving.look()
    assert serving.recall.nearest("item", asked, 10)[1].cut == 2
