# SPDX-License-Identifier: Apache-2.0
"""The job that the serving benchmark follows: a shard with a table, and who stands for its coordinator, in one process.

Invariant: the shard is what a job has; of a coordinator there is only what a process that serves asks it. It ends when its
standard input closes. `python -m oarlock.benchmarks.serving_peer FOLDER ROWS`: FOLDER becomes the job's.
"""

import json
import sys
from pathlib import Path

import numpy as np

from oarlock.client.entry import write_address
from oarlock.client.job import JobSpec
from oarlock.client.router import ShardAddress, pack_placement
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.policy import Eviction
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.warmup import warm_up
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import DescribeReply, DescribeRequest, StatusReply, StatusRequest
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcServer
from oarlock.proto.shard_pb2 import AdoptRequest
from oarlock.ps.identity import Identity
from oarlock.ps.process import SWITCH_SECONDS
from oarlock.ps.service import ShardService

DIM, BLOCKS = 16, 64
INCARNATION = 100
# Rows of the table of marks: one block, and once there are so many the oldest go, a tenth of them at a time.
MARKS = 192
_MARK_BYTES = 24
SGD, ZEROS = OptimizerSpec("sgd"), Initializer("zeros")
TABLES = (
    TableSpec("rows", DIM, OptimizerSpec("adagrad"), Initializer("normal", 0.0, 0.1), BLOCKS),
    TableSpec("marks", 1, SGD, ZEROS, 1, eviction=Eviction(max_bytes=MARKS * _MARK_BYTES)),
)
SPEC = JobSpec(
    job="5e" * 16, name="followed", seed=0, recipe="none:none", tables=TABLES, dense=(), files=(), evaluation_files=(),
    splits=2, evaluation_splits=0, rows_per_split=1, evaluation_rows_per_split=1, batch_rows=1, epochs=1, servers=1,
    workers=1, metrics=("none",),
)  # fmt: skip


class Coordinator:
    """Answers what a process that serves asks: where the one shard is."""

    def __init__(self, address: str) -> None:
        shards = {0: ShardAddress(0, address, INCARNATION)}
        self.placement = pack_placement(1, np.zeros(BLOCKS + 1, np.int32), shards)

    def describe(self, request: DescribeRequest) -> DescribeReply:
        return DescribeReply(job=SPEC.job_bytes, run=1, spec=SPEC.to_json(), placement=self.placement)

    def status(self, request: StatusRequest) -> StatusReply:
        return StatusReply(status=json.dumps({"phase": "training", "events": [], "checkpoints": []}))


def main() -> int:
    """Serve until standard input closes."""
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    sys.setswitchinterval(SWITCH_SECONDS)
    warm_up()
    service = ShardService()
    held = service.configure(SPEC, Identity(SPEC.job_bytes, 1, 0, INCARNATION))
    assert held.tables[1].row_bytes == _MARK_BYTES, held.tables[1].row_bytes
    server = GrpcServer(service, "Shard", listen="127.0.0.1:0")
    coordinator = Coordinator(server.start())
    beside = GrpcServer(coordinator, "Coordinator", listen="127.0.0.1:0")
    header = Header(protocol=PROTOCOL, job=SPEC.job_bytes, run=1, target=INCARNATION, term=1)
    service.adopt(AdoptRequest(header=header, placement=coordinator.placement))
    sorter, ranks = KeySorter(), np.arange(BLOCKS, dtype=np.int32)
    for begin in range(0, rows, 1 << 16):
        keys = np.arange(begin, min(rows, begin + (1 << 16)), dtype=np.uint64)
        found = sorter.build(keys, table_salt("rows"), BLOCKS.bit_length() - 1, ranks)
        held.tables[0].push(
            found.keys, found.blocks, found.counts, np.ones((len(keys), DIM), np.float32), rate=0.1, step=1
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(SPEC.to_json(), encoding="utf-8")
    write_address(folder, beside.start())
    print(json.dumps({"shard": coordinator.placement.shards[0].address}), flush=True)
    try:
        sys.stdin.read()
    finally:
        for each in (server, beside):
            each.stop()
        service.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
