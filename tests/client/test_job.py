# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest
import rig

from oarlock.client.job import JobSpec
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto.errors import InvalidArgument


def test_a_job_travels_whole_as_text():
    spec = rig.spec_of(
        config={"factors": [1, 2]}, seed=(1 << 64) - 1, files=({"path": "ä"},), compute_threads=256, blas_threads=3
    )
    again = JobSpec.from_json(spec.to_json())
    assert again == spec
    assert again.job_bytes == bytes.fromhex(rig.JOB)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"job": "12"}, "job id '12': give 32 hexadecimal digits"),
        ({"job": "x" * 32}, "give 32 hexadecimal digits"),
        ({"job": None}, "give 32 hexadecimal digits"),
        ({"mode": "sync"}, "mode 'sync': choose one of async"),
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
        ({"tables": (TableSpec("a", 2), TableSpec("a", 3))}, "two parameters are named 'a'"),
        ({"tables": (TableSpec("a", 2),), "dense": (DenseSpec("a", (3,)),)}, "two parameters are named 'a'"),
    ],
)
def test_a_job_that_cannot_be_is_refused_when_it_is_made(changes, problem):
    with pytest.raises(InvalidArgument, match=problem):
        rig.spec_of(**changes)


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
