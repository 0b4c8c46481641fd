# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest
import rig

from oarlock.client.autoscale import Autoscale
from oarlock.client.compression import WireSpec
from oarlock.client.job import JobSpec
from oarlock.embedding.schedule import Schedule
from oarlock.embedding.spec import CacheSpec, DenseSpec, OptimizerSpec, Part, TableSpec
from oarlock.proto.errors import InvalidArgument


def test_a_job_travels_whole_as_text():
    spec = rig.spec_of(
        config={"factors": [1, 2]},
        seed=(1 << 64) - 1,
        files=({"path": "ä"},),
        compute_threads=256,
        blas_threads=3,
        autoscale=Autoscale(servers_most=4, busy_share=0.5, dry_run=True),
    )
    again = JobSpec.from_json(spec.to_json())
    assert again == spec
    assert again.job_bytes == bytes.fromhex(rig.JOB)


def test_a_job_of_before_there_was_a_scaler_leaves_its_numbers_alone():
    values = json.loads(rig.spec_of().to_json())
    assert values.pop("autoscale") == {}
    assert JobSpec.from_json(json.dumps(values)).autoscale == Autoscale()
    for wrong, said in (({"servers_most": "4"}, "autoscale.servers_most = '4': give an integer"), ([], "give a table")):
        with pytest.raises(InvalidArgument, match=said):
            JobSpec.from_json(json.dumps({**values, "autoscale": wrong}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"autoscale": Autoscale(servers_most=1), "replicas": 1, "servers": 2},
            "servers_most = 1 and replicas = 1 contradict",
        ),
        ({"job": "12"}, "job id '12': give 32 hexadecimal digits"),
        ({"job": "x" * 32}, "give 32 hexadecimal digits"),
        ({"job": None}, "give 32 hexadecimal digits"),
        ({"accumulate": 0}, "accumulate = 0: give an integer >= 1"),
        ({"accumulate": 1.5}, "accumulate = 1.5: give an integer >= 1"),
        ({"accumulate": True}, "accumulate = True: give an integer >= 1"),
        ({"staleness": 2}, "staleness = 2 and mode = 'async' contradict each other"),
        ({"staleness": 2, "mode": "geo"}, "staleness = 2 and mode = 'geo' contradict each other"),
        ({"mode": "bsp"}, "mode 'bsp': choose one of async, ssp, geo, sync, hybrid"),
        ({"mode": "hybrid"}, "mode = 'hybrid' needs ranks"),
        ({"mode": "hybrid", "ranks": 2, "dense": ()}, "without dense parameters contradict each other: .*'async'"),
        ({"mode": "hybrid", "ranks": 2, "tables": ()}, "without tables contradict each other: .*'sync'"),
        ({"mode": "hybrid", "ranks": 2, "staleness": 1}, "staleness = 1 and mode = 'hybrid' contradict each other"),
        (
            {"mode": "hybrid", "ranks": 2, "compression": {"dense": WireSpec(push="topk:0.1")}},
            "mode = 'hybrid' and compression.dense.push = 'topk:0.1' contradict each other",
        ),
        ({"mode": "sync"}, "mode = 'sync' needs ranks"),
        ({"ranks": 2}, "ranks = 2 and mode = 'async' contradict each other"),
        ({"mode": "sync", "ranks": 4097}, "ranks = 4097: give an integer from 0 to 4096"),
        ({"mode": "sync", "ranks": True}, "ranks = True: give an integer"),
        ({"mode": "sync", "ranks": 2, "prefetch": 2}, "mode = 'sync' and prefetch = 2 contradict each other"),
        ({"mode": "sync", "ranks": 2, "staleness": 1}, "staleness = 1 and mode = 'sync' contradict each other"),
        (
            {"mode": "sync", "ranks": 2, "tables": (TableSpec("a", 2, cache=CacheSpec(9)),)},
            "mode = 'sync' and the cache of table a contradict each other",
        ),
        (
            {
                "mode": "sync",
                "ranks": 2,
                "tables": (TableSpec("a", 2),),
                "compression": {"a": WireSpec(push="int8+feedback")},
            },
            "mode = 'sync' and compression.a.push = 'int8\\+feedback' contradict each other",
        ),
        ({"batch_rows": 0}, "batch_rows = 0: give an integer >= 1"),
        ({"epochs": 1.5}, "epochs = 1.5: give an integer >= 1"),
        ({"servers": True}, "servers = True: give an integer >= 1"),
        ({"workers": "2"}, "workers = '2': give an integer >= 1"),
        ({"checkpoints_kept": 0}, "checkpoints_kept = 0: give an integer >= 1"),
        ({"checkpoint_epochs": -1}, "checkpoint_epochs = -1: give an integer >= 0"),
        ({"evaluation_splits": None}, "evaluation_splits = None: give an integer >= 0"),
        ({"compute_threads": 0}, "compute_threads = 0: give an integer from 1 to 256"),
        ({"blas_threads": 257}, "blas_threads = 257: give an integer from 1 to 256"),
        ({"blas_threads": True}, "blas_threads = True: give an integer from 1"),
        ({"compute_threads": 2.0}, "compute_threads = 2.0: give an integer from 1"),
        ({"seed": -1}, "seed = -1: give an integer from 0"),
        ({"seed": 1 << 64}, "give an integer from 0 to 2\\^64 - 1"),
        ({"seed": "1"}, "seed = '1': give an integer"),
        ({"lease_seconds": "5"}, "lease_seconds = '5': give a number of seconds"),
        ({"heartbeat_seconds": 0}, "must be above 0 and below lease_seconds"),
        ({"heartbeat_seconds": 5.0}, "must be above 0 and below lease_seconds = 5.0"),
        ({"lease_seconds": float("nan")}, "must be above 0 and below lease_seconds = nan"),
        (
            {"mode": "ssp", "tables": (TableSpec("a", 2), TableSpec("b", 2, cache=CacheSpec(9)))},
            "mode = 'ssp' and the cache of table b contradict each other: .*give mode = 'async' or 'hybrid', or no cache",
        ),
        (
            {"mode": "geo", "tables": (TableSpec("a", 2, rig.SGD, cache=CacheSpec(9)),)},
            "mode = 'geo' and the cache of table a",
        ),
        ({"tables": (TableSpec("a", 2), TableSpec("a", 3))}, "two parameters are named 'a'"),
        ({"tables": (TableSpec("a", 2),), "dense": (DenseSpec("a", (3,)),)}, "two parameters are named 'a'"),
    ],
)
def test_a_job_that_cannot_be_is_refused_when_it_is_made(changes, problem):
    with pytest.raises(InvalidArgument, match=problem):
        rig.spec_of(**changes)


SGD = OptimizerSpec("sgd")


def test_hybrid_goes_with_what_async_has_for_rows():
    spec = rig.spec_of(
        mode="hybrid",
        ranks=3,
        prefetch=4,
        accumulate=2,
        tables=(TableSpec("a", 2, cache=CacheSpec(9)), TableSpec("c", 2)),
        compression={"c": WireSpec(push="int8+feedback"), "dense": WireSpec("bfloat16", "int8")},
        splits=5000,
    )
    assert (spec.ranks, spec.closed_window) == (3, 5000)
    assert rig.spec_of(splits=5000).closed_window == 1024


def test_geo_is_for_plain_sgd():
    part = Part(1, SGD)
    assert rig.spec_of(mode="geo", accumulate=3).mode == "geo"
    rig.spec_of((TableSpec("user", 2, parts=(part, part)),), (), mode="geo")


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSpec("adam"),
        OptimizerSpec("momentum"),
        OptimizerSpec("sgd", clip_norm=1.0),
        OptimizerSpec("sgd", decay=0.1),
        OptimizerSpec("sgd", lower=-1.0),
        OptimizerSpec("sgd", schedule=Schedule("cosine", steps=10)),
    ],
    ids=str,
)
def test_geo_and_any_other_optimizer_contradict_each_other(optimizer):
    """Of a table, of a part of one, of a dense parameter: the message names mode and parameter."""
    jobs = [
        ("user", {"tables": (TableSpec("item", 2, SGD), TableSpec("user", 2, optimizer))}),
        ("user", {"tables": (TableSpec("user", 2, parts=(Part(1, SGD), Part(1, optimizer))),)}),
        ("w", {"tables": (TableSpec("item", 2, SGD),), "dense": (DenseSpec("w", (3,), optimizer),)}),
    ]
    for name, changes in jobs:
        problem = f"mode = 'geo' and the optimizer of {name}, '{optimizer.name}', contradict each other"
        with pytest.raises(InvalidArgument, match=problem):
            rig.spec_of(**changes, mode="geo")
        rig.spec_of(**changes, accumulate=3)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '"job"', '{"tables": 1}'])
def test_what_is_no_job_is_refused(text):
    with pytest.raises(InvalidArgument, match="this is no job description"):
        JobSpec.from_json(text)


def test_unknown_and_missing_fields_are_refused():
    values = json.loads(rig.spec_of().to_json())
    with pytest.raises(InvalidArgument, match="colour"):
        JobSpec.from_json(json.dumps({**values, "colour": 1}))
    for field in dataclasses.fields(JobSpec):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            with pytest.raises(InvalidArgument, match=field.name):
                JobSpec.from_json(json.dumps({k: v for k, v in values.items() if k != field.name}))
