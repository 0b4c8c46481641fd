# SPDX-License-Identifier: Apache-2.0
"""One message of every type of serving and health, with every field set. A conftest loads it as ``golden_serving``."""

from golden_rig import GRADIENTS, JOB, KEYS, failure
from google.protobuf.message import Message

from oarlock.proto import health_pb2, serving_pb2
from oarlock.proto.arrays import pack


def model_version() -> serving_pb2.ModelVersion:
    return serving_pb2.ModelVersion(run=2, cut=300, seconds_since=1.5)


def served_table() -> serving_pb2.ServedTable:
    return serving_pb2.ServedTable(name="user", dim=16, rows=70_000, dtype="bfloat16", bytes=1 << 33, absent="first")


SERVING: dict[str, Message] = {
    message.DESCRIPTOR.name: message
    for message in (
        model_version(),
        serving_pb2.TableLookup(table="user", keys=pack(KEYS)),
        serving_pb2.LookupRequest(
            protocol=1,
            tables=[serving_pb2.TableLookup(table="user", keys=pack(KEYS)), serving_pb2.TableLookup(table="b")],
        ),
        serving_pb2.TableFound(rows=pack(GRADIENTS), missing=300),
        serving_pb2.LookupReply(
            version=model_version(),
            tables=[serving_pb2.TableFound(rows=pack(GRADIENTS), missing=300)],
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
        ),
        serving_pb2.ServeCutRequest(protocol=1, cut=300, newest=True),
        health_pb2.HealthCheckRequest(service="oarlock.Serving"),
        health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING),
    )
}
