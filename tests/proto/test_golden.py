# SPDX-License-Identifier: Apache-2.0
"""Messages that were worked out by hand from the field numbers: other releases read and write exactly these bytes."""

from pathlib import Path

import numpy as np
import pytest

from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import SHARD, JoinRequest
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.shard_pb2 import DenseGradients, PullRequest, PushRequest, TableGradients, TableKeys

GOLDEN = Path(__file__).with_name("golden")
KEYS = np.array([5, (1 << 64) - 1], np.uint64)
BLOCKS = np.array([0, 3], np.int32)
COUNTS = np.array([1, 1], np.int32)
GRADIENTS = np.array([[1.0, -2.0], [0.5, 0.0]], np.float32)


def golden(name):
    """Return the bytes of a file of hex digits, whose lines end in comments."""
    lines = (GOLDEN / f"{name}.hex").read_text(encoding="ascii").splitlines()
    return bytes.fromhex(" ".join(line.split("#")[0] for line in lines))


def header(**more):
    return Header(protocol=1, job=bytes(range(16)), run=2, sender=3, target=4, **more)


def keys():
    return TableKeys(table=1, keys=pack(KEYS), blocks=pack(BLOCKS), counts=pack(COUNTS))


MESSAGES = {
    "pull": lambda: PullRequest(header=header(), tables=[keys()], dense=pack(np.array([7], np.int32))),
    "push": lambda: PushRequest(
        header=header(generation=9),
        split=300,
        group=5,
        tables=[TableGradients(keys=keys(), gradients=pack(GRADIENTS), rate=0.5)],
        dense=[
            DenseGradients(
                blocks=pack(np.array([7], np.int32)), gradients=pack(np.array([0.25], np.float32)), rate=0.125
            )
        ],
    ),
    "join": lambda: JoinRequest(
        protocol=1, role=SHARD, address="127.0.0.1:5000", nonce=(1 << 63) - 1, pid=4242, host="h", reader="arrow"
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_written_as_ever(name):
    assert MESSAGES[name]().SerializeToString(deterministic=True).hex() == golden(name).hex()


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_of_old_is_read(name):
    made = MESSAGES[name]()
    assert type(made).FromString(golden(name)) == made


def test_the_arrays_of_an_old_push_are_read():
    push = PushRequest.FromString(golden("push"))
    assert np.array_equal(unpack(push.tables[0].keys.keys, np.uint64, "keys"), KEYS)
    assert np.array_equal(unpack(push.tables[0].gradients, np.float32, "gradients", dims=2), GRADIENTS)
    assert (push.split, push.group, push.tables[0].rate, push.dense[0].rate) == (300, 5, 0.5, 0.125)


def test_paths_and_attributes_of_methods():
    assert PROTOCOL == 1
    assert METHODS["Shard.Pull"].path == "/oarlock.Shard/Pull"
    assert METHODS["Coordinator.CloseSplit"].attribute == "close_split"
    assert {name for name, method in METHODS.items() if method.streamed} == {"Shard.Pull", "Shard.Push"}
    for name, method in METHODS.items():
        assert method.name == name
        assert not method.streamed or "failure" in method.reply.DESCRIPTOR.fields_by_name
