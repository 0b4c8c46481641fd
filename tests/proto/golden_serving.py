# SPDX-License-Identifier: Apache-2.0
"""One message of every type of serving, of what it follows and of health, with every field set.

A conftest loads it as ``golden_serving``.
"""

import numpy as np
from golden_rig import FULL, GRADIENTS, JOB, KEYS, failure, generations, int32, placement
from google.protobuf.message import Message

from oarlock.proto import health_pb2, serving_pb2, shard_pb2
from oarlock.proto.arrays import pack


def model_version() -> serving_pb2.ModelVersion:
    return serving_pb2.ModelVersion(run=2, cut=300, seconds_since=1.5, live=True)


def served_table() -> serving_pb2.ServedTable:
    told = {"name": "user", "dim": 16, "rows": 70_000, "dtype": "bfloat16", "bytes": 1 << 33, "absent": "first"}
    return serving_pb2.ServedTable(**told, blocks=64, salt=1 << 63)


def table_changes() -> shard_pb2.TableChanges:
    return shard_pb2.TableChanges(
        table=1,
        whole=True,
        blocks=int32(3),
        before=generations(4),
        after=generations(300),
        counts=int32(2),
        keys=pack(KEYS),
        rows=pack(np.array([[1, 2], [3, 4]], np.uint8)),
        gone_counts=int32(1),
        gone=generations(9),
        next=(1 << 64) - 1,
    )


SERVING: dict[str, Message] = {
    message.DESCRIPTOR.name: message
    for message in (
        model_version(),
        serving_pb2.TableLookup(table="user", keys=pack(KEYS)),
        serving_pb2.LookupRequest(
            protocol=1,
            tables=[serving_pb2.TableLookup(table="user", keys=pack(KEYS)), serving_pb2.TableLookup(table="b")],
            version=model_version(),
            job=JOB.hex(),
        ),
        serving_pb2.TableFound(rows=pack(GRADIENTS), missing=300),
        serving_pb2.LookupReply(
            version=model_version(),
            tables=[serving_pb2.TableFound(rows=pack(GRADIENTS), missing=300)],
            failure=failure(),
        ),
        serving_pb2.NearestRequest(
            protocol=1,
            table="item",
            vectors=pack(GRADIENTS),
            k=100,
            exact=True,
            among=pack(KEYS),
            without=pack(KEYS[:1]),
            version=model_version(),
            job=JOB.hex(),
        ),
        serving_pb2.NearestReply(
            version=model_version(),
            keys=pack(KEYS),
            scores=pack(GRADIENTS),
            counts=[3, 300],
            failure=failure(),
        ),
        serving_pb2.ModelRequest(protocol=1),
        served_table(),
        serving_pb2.ModelReply(
            job=JOB.hex(),
            version=model_version(),
            tables=[served_table()],
            pinned=True,
            cuts=[12, 300],
            problem="cut 301: damaged",
            part=1,
            parts=300,
        ),
        serving_pb2.ServeCutRequest(protocol=1, cut=300, newest=True),
        shard_pb2.ChangesRequest(
            header=FULL,
            blocks=int32(1, 5),
            sequences=generations(0, 1 << 40),
            least=generations(7, 0),
            takes=generations(0, 300),
            dense=int32(6, 7),
            dense_stamps=generations(0, 1 << 41),
        ),
        table_changes(),
        shard_pb2.ChangesReply(
            tables=[table_changes()],
            moved=int32(2),
            where=placement(),
            more=True,
            age_seconds=0.25,
            take=300,
            whole=int32(5),
            dense=int32(6, 7),
            dense_stamps=generations(3, 1 << 40),
            dense_values=pack(np.array([0.5, -1.0, 2.0], np.float32)),
            dense_left=4,
        ),
        health_pb2.HealthCheckRequest(service="oarlock.Serving"),
        health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING),
    )
}
