# SPDX-License-Identifier: Apache-2.0
"""One message of every type, byte for byte: other releases read and write exactly these bytes.

``golden/NAME.hex`` is a message of type NAME with every field set, so that no field can take another number or type unseen.
``pull.hex`` and ``push.hex`` leave out what was added later: a message that does not use a new field keeps its bytes.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_rig import EARLIER, GRADIENTS, KEYS, OPERATIONS
from golden_rig import MESSAGES as OF_JOBS
from golden_serving import SERVING
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from oarlock.proto import common_pb2, coordinator_pb2, health_pb2, serving_pb2, shard_pb2
from oarlock.proto.arrays import unpack
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.shard_pb2 import (
    PushRequest,
)

GOLDEN = Path(__file__).with_name("golden")
MESSAGES = {**OF_JOBS, **SERVING}


def golden(name: str) -> bytes:
    """Return the bytes of a file of hex digits, whose lines end in comments."""
    lines = (GOLDEN / f"{name}.hex").read_text(encoding="ascii").splitlines()
    return bytes.fromhex(" ".join(line.split("#")[0] for line in lines))


ALL = {**MESSAGES, **OPERATIONS, **EARLIER}


@pytest.mark.parametrize("name", ALL)
def test_a_message_is_written_as_ever(name: str) -> None:
    assert ALL[name].SerializeToString(deterministic=True).hex() == golden(name).hex()


@pytest.mark.parametrize("name", ALL)
def test_a_message_of_old_is_read(name: str) -> None:
    made = ALL[name]
    assert type(made).FromString(golden(name)) == made


def test_the_arrays_of_an_old_push_are_read() -> None:
    push = PushRequest.FromString(golden("push"))
    assert np.array_equal(unpack(push.tables[0].keys.keys, np.uint64, "keys"), KEYS)
    assert np.array_equal(unpack(push.tables[0].gradients, np.float32, "gradients", dims=2), GRADIENTS)
    assert (push.split, push.group, push.tables[0].rate, push.dense[0].rate) == (300, 5, 0.5, 0.125)
    assert (push.step, push.number) == (0, 0)


def nested(found: Descriptor) -> Iterator[str]:
    yield found.name
    for field in found.fields:
        if field.message_type is not None:
            yield from nested(field.message_type)


def test_every_message_has_a_golden_file() -> None:
    # The messages of the Open Inference Protocol are not ours to change: tests/serving/test_inference.py compares them.
    own = [m for m in METHODS.values() if m.package == "oarlock"]
    used = {name for m in own for kind in (m.request, m.reply) for name in nested(kind.DESCRIPTOR)}
    # What gRPC's own health service carries (proto/rpc/health.py).
    used |= set(health_pb2.DESCRIPTOR.message_types_by_name)
    files = (common_pb2, coordinator_pb2, health_pb2, serving_pb2, shard_pb2)
    declared = {name for file in files for name in file.DESCRIPTOR.message_types_by_name}
    assert {path.stem for path in GOLDEN.iterdir()} == used | set(EARLIER) | set(OPERATIONS)
    # A message that no method carries would be dead.
    assert declared == used == set(MESSAGES)


def form(field: FieldDescriptor, value: Any) -> tuple[Any, ...]:
    """Return what tells a field's value from that of another field of the same kind."""
    if field.message_type is None:
        return (field.type, repr(value))
    values = list(value) if field.is_repeated else [value]
    return (field.message_type.name, *(v.SerializeToString(deterministic=True) for v in values))


@pytest.mark.parametrize("name", MESSAGES)
def test_every_field_is_set_and_told_apart(name: str) -> None:
    message = MESSAGES[name]
    found = message.ListFields()
    chosen = {
        field.name for one in message.DESCRIPTOR.oneofs for field in one.fields if not message.HasField(field.name)
    }
    known = sorted(message.DESCRIPTOR.fields, key=lambda field: field.number)
    assert [field.name for field, _ in found] == [field.name for field in known if field.name not in chosen]
    same = [(a.name, b.name) for (a, x), (b, y) in combinations(found, 2) if form(a, x) == form(b, y)]
    assert same == []


def test_everything_that_an_operation_may_have_done_has_a_golden_file() -> None:
    made = [MESSAGES["Operation"], *OPERATIONS.values()]
    assert [message.WhichOneof("does") for message in made] == [  # type: ignore[arg-type]
        field.name for field in shard_pb2.Operation.DESCRIPTOR.oneofs_by_name["does"].fields
    ]


def test_numbers_of_enums_never_change_meaning() -> None:
    files = (common_pb2, coordinator_pb2, health_pb2, serving_pb2, shard_pb2)
    enums = [e for file in files for e in file.DESCRIPTOR.enum_types_by_name.values()]
    assert {e.name: {v.name: v.number for v in e.values} for e in enums} == {
        "DType": {"DTYPE_UNSPECIFIED": 0, "UINT64": 1, "INT32": 2, "FLOAT32": 3, "UINT32": 4, "UINT8": 5},
        "Role": {"ROLE_UNSPECIFIED": 0, "SHARD": 1, "WORKER": 2},
        "Told": {"TOLD_UNSPECIFIED": 0, "ADDED": 1, "HANDED": 2, "CONFIRMED": 3, "LACKING": 4, "SLOW": 5},
        "Work": {"WORK_UNSPECIFIED": 0, "TRAIN": 1, "EVALUATE": 2, "WAIT": 3, "FINISHED": 4},
        "RowsVerb": {"ROWS_UNSPECIFIED": 0, "GET": 1, "EXPLAIN": 2, "EXPORT": 3, "UNDO": 4, "QUARANTINE": 5},
    }
    # Those of grpc.health.v1.
    status = {"UNKNOWN": 0, "SERVING": 1, "NOT_SERVING": 2, "SERVICE_UNKNOWN": 3}
    assert dict(health_pb2.HealthCheckResponse.ServingStatus.items()) == status


def test_paths_and_attributes_of_methods() -> None:
    assert PROTOCOL == 1
    assert METHODS["Shard.Pull"].path == "/oarlock.Shard/Pull"
    assert METHODS["Coordinator.CloseSplit"].attribute == "close_split"
    assert {name for name, method in METHODS.items() if method.streamed} == {
        "Shard.Pull",
        "Shard.Push",
        "Shard.Replicate",
        "Serving.Lookup",
    }
    for name, method in METHODS.items():
        assert method.name == name
        assert not method.streamed or "failure" in method.reply.DESCRIPTOR.fields_by_name
