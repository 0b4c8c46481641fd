# SPDX-License-Identifier: Apache-2.0
"""What an exactly-once push costs is measured against shards that do the same but for identities and marks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oarlock.benchmarks.exactly_once_handler import (
    Pairs,
    header_for,
    measure_handler,
    measure_memory,
    own_blocks,
    spread,
)
from oarlock.benchmarks.exactly_once_shard import incarnation_of, make_service
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.client.router import Routes, ShardAddress, make_routes
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.proto.bulk import inlined
from oarlock.proto.shard_pb2 import PushRequest
from oarlock.ps.view import image_of

ADAM = OptimizerSpec("adam")
NORMAL = Initializer("normal", scale=0.1)
SPEC = JobSpec(
    job="00112233445566778899aabbccddeeff",
    name="test",
    seed=3,
    recipe="none:none",
    tables=(TableSpec("user", 4, ADAM, NORMAL, blocks=8), TableSpec("item", 3, ADAM, NORMAL, blocks=4)),
    dense=(DenseSpec("w", (3, 3), ADAM, NORMAL, slice=4), DenseSpec("b", (5,), ADAM, NORMAL, slice=3)),
    files=(),
    evaluation_files=(),
    splits=4,
    evaluation_splits=1,
    rows_per_split=10,
    evaluation_rows_per_split=10,
    batch_rows=2,
    epochs=1,
    servers=1,
    workers=1,
    metrics=("auc",),
)
LAYOUT = Layout(SPEC.tables, SPEC.dense)


def routes_of(owners: np.ndarray) -> Routes:
    shards = {n: ShardAddress(n, f"shard-{n}", incarnation_of(n)) for n in range(2)}
    return make_routes(LAYOUT, 1, owners.astype(np.int32), shards)


EVERYTHING = routes_of(np.zeros(LAYOUT.blocks))


def requests_of(count: int, routes: Routes = EVERYTHING) -> list[PushRequest]:
    """Return pushes for shard 0, each with a group number of its own."""
    rng = np.random.default_rng(5)
    found = []
    for group in range(count):
        gradients = {}
        for number, table in enumerate(SPEC.tables):
            keys = rng.integers(0, 60, 40, dtype=np.uint64)
            made = KeySorter().build(keys, table_salt(table.name), table.blocks.bit_length() - 1, routes.ranks[number])
            values = rng.normal(size=(len(made.keys), table.dim)).astype(np.float32)
            gradients[table.name] = RowGradients(made, values, 0.1)
        dense = rng.normal(size=LAYOUT.dense_size).astype(np.float32)
        dense[0] = np.nan if group == 1 else dense[0]
        cut = cut_push(LAYOUT, routes, PushIdentity(0, group), gradients, dense, 0.1)
        found += [inlined(m.bulk) for m in cut if m.shard.id == 0]
    return found


@pytest.mark.parametrize("elsewhere", [0, 5])
def test_without_marks_pushes_that_come_once_leave_the_same(elsewhere: int) -> None:
    # The sender takes all blocks for shard 0's, yet some of every table are not.
    owners = np.zeros(LAYOUT.blocks)
    if elsewhere:
        owners[::elsewhere] = 1
    images, replies = [], []
    for marks in (True, False):
        service = make_service(SPEC, 0, marks=marks)
        shard = own_blocks(service, 0, routes_of(owners), SPEC)
        requests = requests_of(6)
        for request in requests:
            request.header.CopyFrom(header_for(SPEC, 0))
        answers = [service.push(r) for r in requests]
        replies.append([(a.moved.data, a.refused) for a in answers])
        found = [image_of(shard, n) for n in np.flatnonzero(shard.owned).tolist()]
        images.append([(i.name, i.block, i.keys.tobytes(), i.weights.tobytes(), i.state.tobytes()) for i in found])
        assert bool(shard.marks.nbytes) == marks
        # The tables count their own operations, marked or not.
        assert bool(shard.dense_sequence.any()) == marks
        assert shard.counters["pushes"] == 6
        assert shard.counters["dense_refused"] == 1
    assert images[0] == images[1]
    assert replies[0] == replies[1]


def test_without_marks_a_message_may_come_from_anybody_and_twice() -> None:
    service = make_service(SPEC, 0, marks=False)
    shard = own_blocks(service, 0, EVERYTHING, SPEC)
    (request,) = requests_of(1)
    request.ClearField("header")
    before = [image_of(shard, n).weights.tobytes() for n in range(LAYOUT.blocks)]
    service.push(request)
    once = [image_of(shard, n).weights.tobytes() for n in range(LAYOUT.blocks)]
    service.push(request)
    twice = [image_of(shard, n).weights.tobytes() for n in range(LAYOUT.blocks)]
    assert before != once
    assert once != twice


def test_a_round_of_four_gives_one_ratio() -> None:
    pairs = Pairs()
    for which, seconds in ((0, 2.0), (1, 1.0), (1, 2.0), (0, 4.0), (0, 1.0), (1, 1.0), (1, 1.0), (0, 1.0)):
        pairs.add(which, seconds)
    assert pairs.ratios() == [0.5, 1.0]


def test_the_interval_of_a_median_comes_of_the_ranks() -> None:
    found = spread([float(n) for n in range(1, 101)])
    assert found == {"ratio": 50.5, "ratio_iqr": [25.75, 75.25], "ratio_interval": [41.0, 60.0], "pairs": 100}


def test_handler_and_memory() -> None:
    routes = routes_of(np.arange(LAYOUT.blocks) % 2)
    requests = requests_of(4, routes)
    found = measure_handler(SPEC, routes, requests, rounds=4, most_seconds=60.0)
    assert {"handler_us_with", "handler_us_without", "handler_ratio", "handler_ratio_iqr"} < set(found)
    assert found["handler_pairs"] == 4
    assert set(found["handler_parts_us"]) == {"header", "repeated_blocks", "closed_and_missing", "record", "sequence"}
    memory = measure_memory(SPEC, routes, requests[0], 10)
    assert memory["blocks"] == LAYOUT.blocks
    assert memory["marks_bytes"] == memory["marks_bytes_formula"] == LAYOUT.blocks * 10 * 4
    assert memory["marks_bytes_allocated"] > memory["marks_bytes"]
    assert memory["closed_set_wire_bytes"]["most"] < 140


@pytest.mark.slow
def test_the_program(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "oarlock.benchmarks.exactly_once", "--tiny", "--quick", "--json"],
        cwd=tmp_path,
        env={**os.environ, "OPENBLAS_CORETYPE": "Haswell", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.iterdir()), "something was left behind"
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["surroundings"]["openblas_coretype"] == {"found": "Haswell", "used": None}
    assert {
        "samples_per_second_with",
        "samples_per_second_without",
        "ratio",
        "ratio_iqr",
        "handler_us_with",
        "handler_us_without",
        "marks_bytes",
        "marks_bytes_formula",
        "open_splits",
        "blocks",
    } < set(result)
    assert result["pairs"] == 2
    assert len(result["ratio_of_sets"]) == len(result["processor_ratio_of_sets"]) == 1
    assert result["marks_bytes"] == result["marks_bytes_formula"]
