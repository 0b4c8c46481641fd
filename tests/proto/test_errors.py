# SPDX-License-Identifier: Apache-2.0
"""The tree of errors, its numbers, and its map to gRPC's statuses in both directions."""

import grpc
import pytest

from oarlock.proto import errors
from oarlock.proto.common_pb2 import Failure
from oarlock.proto.errors import CODES, OutOfMemory, PSError, Unavailable
from oarlock.proto.rpc import from_status, to_status
from oarlock.proto.rpc.status import failure_of, from_failure

# Numbers on the wire: they never change meaning, and a number that was given away is never given again.
PINNED = {
    1: ("PSError", False),
    2: ("InvalidArgument", False),
    3: ("Malformed", False),
    4: ("SpecMismatch", False),
    5: ("VersionMismatch", False),
    6: ("UnknownTable", False),
    7: ("NotFound", False),
    8: ("WrongJob", False),
    9: ("WrongRun", False),
    10: ("WrongIncarnation", False),
    11: ("StalePlacement", True),
    12: ("LeaseLost", False),
    13: ("Unavailable", True),
    14: ("DeadlineExceeded", True),
    15: ("OutOfMemory", False),
    16: ("CorruptCheckpoint", False),
    17: ("Internal", False),
    18: ("Unauthenticated", False),
    19: ("PermissionDenied", False),
}


def test_codes_never_change_meaning():
    assert {code: (kind.__name__, kind.retryable) for code, kind in CODES.items()} == PINNED


def test_every_class_has_a_code_of_its_own():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, PSError)]
    assert sorted(k.code for k in kinds) == sorted(CODES)
    assert all(CODES[k.code] is k for k in kinds)
    assert all(k.__name__ in (errors.__doc__ or "") for k in kinds)


@pytest.mark.parametrize("kind", CODES.values(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_comes_back_from_it(kind):
    status, text, failure = to_status(kind("what is wrong", block=3))
    assert isinstance(status, grpc.StatusCode)
    assert status is not grpc.StatusCode.OK
    back = from_status(status, text, failure, address="a", method="m")
    assert (type(back), back.message, back.details) == (kind, "what is wrong", {"block": 3})


@pytest.mark.parametrize("status", list(grpc.StatusCode), ids=lambda status: status.name)
def test_every_status_has_an_error(status):
    got = from_status(status, "text of it", None, address="host:1", method="Shard.Pull")
    assert isinstance(got, PSError)
    assert "text of it" in got.message or status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert got.details == {"address": "host:1", "method": "Shard.Pull"}
    assert from_status(status, "", None, address="host:1", method="m").message


def test_only_silence_and_movement_are_worth_another_try():
    again = {s.name for s in grpc.StatusCode if from_status(s, "", None, address="a", method="m").retryable}
    assert again == {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED"}


def test_an_unknown_code_becomes_the_base_class():
    got = from_failure(Failure(code=999, message="of a later release", details='{"x": 1}'))
    assert (type(got), got.message, got.details) == (PSError, "of a later release", {"x": 1})


@pytest.mark.parametrize("details", ["[1]", "{", "null", '"x"', "[" * 100000])
def test_details_that_cannot_be_read_do_not_hide_the_error(details):
    got = from_failure(Failure(code=OutOfMemory.code, message="full", details=details))
    assert (type(got), got.message, got.details) == (OutOfMemory, "full", {})


def test_a_failure_that_is_none_leaves_the_status():
    got = from_status(grpc.StatusCode.UNAVAILABLE, "gone", b"\xff\xff", address="host:1", method="m")
    assert (type(got), got.message) == (Unavailable, "no answer from host:1: gone")


def test_details_too_long_to_travel_stay_behind_whole():
    sent = failure_of(OutOfMemory("full", table="user", list="x" * 3000))
    assert (sent.message, sent.details) == ("full", "{}")


def test_an_error_reads_as_its_message():
    error = Unavailable("not yet", shard=3, message="of the details", self=1)
    assert str(error) == error.message == "not yet"
    assert error.details == {"shard": 3, "message": "of the details", "self": 1}
