# SPDX-License-Identifier: Apache-2.0
"""Of all requests, those that carry a path are named here, and a shard with roots refuses paths that are outside."""

import asyncio
import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from oarlock.client.job import JobSpec
from oarlock.client.router import ShardAddress, pack_placement
from oarlock.embedding.spec import TableSpec
from oarlock.proto.common_pb2 import Empty, Header
from oarlock.proto.coordinator_pb2 import JoinReply
from oarlock.proto.errors import InvalidArgument, PermissionDenied, PSError
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.shard_pb2 import AdoptRequest, ReplaceRequest, WriteRequest
from oarlock.proto.transport import dispatch
from oarlock.ps.identity import Identity
from oarlock.ps.process import run_shard
from oarlock.ps.service import ShardService

PLACEMENT = pack_placement(1, np.zeros(2, np.int32), {0: ShardAddress(0, "shard-0", 4)})
# Where a text of a message is a path; those of other fields are names, reasons and descriptions.
PATHS = {"Shard.Adopt": "restore", "Shard.Write": "root", "Shard.Replace": "path", "Coordinator.Rollback": "path"}
NO_PATHS = {
    "Coordinator.Join": {"address", "host", "reader", "signature"},
    "Coordinator.Heartbeat": {"stats"},
    "Coordinator.Leave": {"error"},
    "Coordinator.Release": {"reason"},
    "Coordinator.Rollback": {"table"},
    "Coordinator.Stop": {"reason"},
    "Shard.Replace": {"table"},
    "Shard.Hello": {"version"},
    "Coordinator.Hello": {"version"},
    "Serving.Lookup": {"job"},
    "Serving.Nearest": {"table", "job"},
    "GRPCInferenceService.ModelReady": {"name", "version"},
    "GRPCInferenceService.ModelMetadata": {"name", "version"},
    "GRPCInferenceService.ModelInfer": {"model_name", "model_version", "id"},
}


def test_every_text_of_a_request_is_known_to_be_a_path_or_not() -> None:
    for method in METHODS.values():
        texts = {f.name for f in method.request.DESCRIPTOR.fields if f.type == f.TYPE_STRING}
        expected = NO_PATHS.get(method.name, set()) | ({PATHS[method.name]} if method.name in PATHS else set())
        assert texts == expected, f"{method.name}: say here whether a new text is a path, and bound it if it is"


def spec(**changes: object) -> JobSpec:
    made = JobSpec(
        job=bytes(range(16)).hex(), name="roots", seed=1, recipe="none:none", tables=(TableSpec("user", 2, blocks=2),), dense=(),
        files=(), evaluation_files=(), splits=1, evaluation_splits=0, rows_per_split=1, evaluation_rows_per_split=1, batch_rows=1,
        epochs=1, servers=1, workers=1, metrics=("auc",),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def refused(service: ShardService, path: str) -> list[bool]:
    """Return for each request with a path whether it met the roots."""
    head = Header(protocol=PROTOCOL, job=spec().job_bytes, run=1, target=4, term=1)
    found = []
    for method, request in (
        ("Shard.Adopt", AdoptRequest(header=head, placement=PLACEMENT, restore=path)),
        ("Shard.Write", WriteRequest(header=head, root=path, cut=1)),
        ("Shard.Replace", ReplaceRequest(header=head, table="user", path=path)),
    ):
        try:
            dispatch(service, method, request)
        except PermissionDenied:
            found.append(True)
        except PSError:
            found.append(False)
        else:
            found.append(False)
    return found


@pytest.mark.parametrize("given", [False, True], ids=["the job's own", "given"])
def test_every_request_with_a_path_is_bounded(tmp_path: Path, given: bool) -> None:
    service = ShardService(roots=[f"{tmp_path}/given"] if given else [])
    service.configure(spec(checkpoint_path=f"{tmp_path}/own"), Identity(spec().job_bytes, 1, 0, 4))
    inside = ("own", "given") if given else ("own",)
    outside = () if given else (f"{tmp_path}/given@1",)
    for path in (*outside, f"{tmp_path}/own/../x@1", "/etc@1", "s3://bucket/x@1"):
        assert refused(service, path) == [True] * 3, path
    for name in inside:
        assert True not in refused(service, f"{tmp_path}/{name}@1")[1:]
    service.end()


def test_a_shard_that_could_write_no_checkpoint_does_not_join_and_says_so() -> None:
    calls: list[tuple[str, object]] = []

    class OneShardJob:
        async def call(self, address: str, method: str, request: object, *, timeout_seconds: float) -> object:
            calls.append((method, request))
            return JoinReply(spec=spec().to_json(), incarnation=4, run=1) if method == "Coordinator.Join" else Empty()

    shard = run_shard(OneShardJob(), "", ShardService(roots=[]), "shard-0", rng=random.Random(1))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"job roots keeps its checkpoints in its own folder, .* --root FOLDER"):
        asyncio.run(shard)
    assert [method for method, _ in calls] == ["Coordinator.Join", "Coordinator.Leave"]
    assert "--root FOLDER" in calls[1][1].error  # type: ignore[attr-defined]


def test_without_roots_nothing_is(tmp_path: Path) -> None:
    service = ShardService()
    service.configure(spec(), Identity(spec().job_bytes, 1, 0, 4))
    assert True not in refused(service, f"{tmp_path}/x@1")
    service.end()
