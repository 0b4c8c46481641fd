# SPDX-License-Identifier: Apache-2.0
"""Errors as gRPC statuses and back.

Invariant: `to_status` and `from_status` are total: every error class has a status and every status an error class, and an
error that crossed the wire has the class, message and details it had.
"""

import json
import logging

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from oarlock.proto import errors
from oarlock.proto.arrays import MAX_MESSAGE_BYTES
from oarlock.proto.common_pb2 import Failure
from oarlock.proto.errors import CODES, PSError

logger = logging.getLogger(__name__)

FAILURE_KEY = "oarlock-failure-bin"
# A failed call travels in headers, which have a limit of their own (8 KiB in all): what is longer is cut, the code stays.
MESSAGE_BYTES = 2048
DETAILS_BYTES = 2048
# How gRPC itself says that a server has all the calls that it may have.
TOO_MANY_CALLS = "Concurrent RPC limit exceeded"
# The status has room for a summary; the whole message is in the Failure.
TEXT_CHARACTERS = 200

_S = grpc.StatusCode
_STATUS: dict[type[PSError], grpc.StatusCode] = {
    errors.PSError: _S.UNKNOWN,
    errors.InvalidArgument: _S.INVALID_ARGUMENT,
    errors.Malformed: _S.INVALID_ARGUMENT,
    errors.SpecMismatch: _S.FAILED_PRECONDITION,
    errors.VersionMismatch: _S.FAILED_PRECONDITION,
    errors.UnknownTable: _S.NOT_FOUND,
    errors.NotFound: _S.NOT_FOUND,
    errors.WrongJob: _S.FAILED_PRECONDITION,
    errors.WrongRun: _S.FAILED_PRECONDITION,
    errors.WrongIncarnation: _S.FAILED_PRECONDITION,
    errors.StalePlacement: _S.ABORTED,
    errors.LeaseLost: _S.PERMISSION_DENIED,
    errors.Unavailable: _S.UNAVAILABLE,
    errors.DeadlineExceeded: _S.DEADLINE_EXCEEDED,
    errors.OutOfMemory: _S.RESOURCE_EXHAUSTED,
    errors.CorruptCheckpoint: _S.DATA_LOSS,
    errors.Internal: _S.INTERNAL,
    errors.Unauthenticated: _S.UNAUTHENTICATED,
    errors.PermissionDenied: _S.PERMISSION_DENIED,
}
# What a bare status means: one that gRPC itself or another program made.
_ERROR: dict[grpc.StatusCode, type[PSError]] = {
    _S.OK: errors.Internal,
    _S.CANCELLED: errors.Unavailable,
    _S.UNKNOWN: errors.PSError,
    _S.INVALID_ARGUMENT: errors.InvalidArgument,
    _S.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    _S.NOT_FOUND: errors.NotFound,
    _S.ALREADY_EXISTS: errors.InvalidArgument,
    _S.PERMISSION_DENIED: errors.PermissionDenied,
    _S.RESOURCE_EXHAUSTED: errors.OutOfMemory,
    _S.FAILED_PRECONDITION: errors.InvalidArgument,
    _S.ABORTED: errors.StalePlacement,
    _S.OUT_OF_RANGE: errors.InvalidArgument,
    _S.UNIMPLEMENTED: errors.NotFound,
    _S.INTERNAL: errors.Internal,
    _S.UNAVAILABLE: errors.Unavailable,
    _S.DATA_LOSS: errors.CorruptCheckpoint,
    _S.UNAUTHENTICATED: errors.Unauthenticated,
}


def to_status(error: PSError) -> tuple[grpc.StatusCode, str, bytes]:
    """Return the status, its text, and the bytes of the Failure message for ``error``."""
    text = error.message.encode("ascii", "replace").decode()
    return _STATUS[type(error)], _cut(text, TEXT_CHARACTERS), failure_of(error).SerializeToString()


def failure_of(error: PSError) -> Failure:
    """Return the message that carries ``error``."""
    details = json.dumps(error.details, default=_plain)
    if len(details) > DETAILS_BYTES:
        details = "{}"
    return Failure(code=error.code, message=_cut(error.message, MESSAGE_BYTES), details=details)


def _plain(value: object) -> object:
    """Return what JSON can hold of a detail; numbers stay numbers."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _cut(text: str, size: int) -> str:
    """Return ``text``, or its first ``size`` bytes and a sign that there was more."""
    data = text.encode("utf-8", "replace")
    return data.decode() if len(data) <= size else data[:size].decode("utf-8", "ignore") + " ..."


def from_failure(sent: Failure) -> PSError:
    """Return the error that a Failure carries; a code that this release does not know becomes the base class."""
    try:
        details = json.loads(sent.details or "{}")
    except (ValueError, RecursionError):
        details = {}
    kind = CODES.get(sent.code, PSError)
    return kind(sent.message, **details) if isinstance(details, dict) else kind(sent.message)


def from_status(status: grpc.StatusCode, text: str, failure: bytes | None, *, address: str, method: str) -> PSError:
    """Return the error that a failed call means; ``failure`` is the trailing metadata, if there was any."""
    if failure is not None:
        try:
            return from_failure(Failure.FromString(failure))
        except DecodeError:
            logger.warning("event=failure_undecodable address=%s method=%s", address, method)
    kind = _ERROR[status]
    if status is _S.UNIMPLEMENTED:
        text = f"{address} does not answer {method}; is it an Oarlock process of this version? ({text})"
    elif status is _S.UNAVAILABLE:
        text = f"no answer from {address}: {text}"
    elif status is _S.DEADLINE_EXCEEDED:
        text = f"{method} at {address}: no answer in time"
    elif status is _S.RESOURCE_EXHAUSTED and TOO_MANY_CALLS in text:
        return errors.Unavailable(f"{address} has too many calls at once", address=address, method=method)
    elif status is _S.RESOURCE_EXHAUSTED:
        text = f"{method} at {address}: a message is over the limit of {MAX_MESSAGE_BYTES} bytes ({text})"
    return kind(text or status.name, address=address, method=method)
