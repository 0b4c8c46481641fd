# SPDX-License-Identifier: Apache-2.0
"""Requests and responses of HTTP/1.1, as far as a service of short JSON and binary bodies needs them.

Invariant: a head is read strictly, and what two readers could take for different things is refused: a length that is said twice
or is no number, another framing than by length, folded lines, names with blanks. Pure; any thread.
"""

import json
import re
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import unquote

HEAD_BYTES = 16 << 10
MAX_HEADERS = 64
MAX_TARGET = 4096
END = b"\r\n\r\n"
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])")
# Once is enough: who sends two may be taken for somebody else.
_SINGLE = (
    "authorization",
    "content-length",
    "content-type",
    "content-encoding",
    "expect",
    "host",
    "inference-header-content-length",
)


class Refused(Exception):
    """A request that is answered with ``status``; its connection ends then, since where the next one begins is not known."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Request(NamedTuple):
    """``path``: the segments, decoded; ``headers``: by name in small letters; ``body`` is there once it was asked for."""

    method: str
    path: tuple[str, ...]
    headers: dict[str, str]
    keeps: bool
    body: memoryview = memoryview(b"")

    @property
    def length(self) -> int:
        """How many bytes the body has."""
        return int(self.headers.get("content-length", "0"))


class Response(NamedTuple):
    """What is sent back. ``parts``: the body."""

    status: HTTPStatus
    parts: tuple[bytes | memoryview, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/json"


def json_response(status: HTTPStatus, value: Any, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """Return a response of JSON."""
    return Response(status, (json.dumps(value, allow_nan=False).encode(),), headers)


def error_response(status: HTTPStatus, text: str, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """Return a response that says what is wrong, as the Open Inference Protocol has it."""
    return json_response(status, {"error": text}, headers)


def parse_head(head: bytes) -> Request:
    """Return the request of a head, without the empty line at its end; Refused."""
    first, *lines = head.split(b"\r\n")
    found = _LINE.fullmatch(first)
    if found is None or len(found[2]) > MAX_TARGET:
        raise Refused(HTTPStatus.BAD_REQUEST, "the first line is none of HTTP/1.1, or its target is too long")
    if len(lines) > MAX_HEADERS:
        raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or b"\n" in value or b"\r" in value or b"\0" in value:
            raise Refused(HTTPStatus.BAD_REQUEST, "a header is none")
        key = name.decode("ascii").lower()
        if key in headers and key in _SINGLE:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{key} comes twice")
        headers[key] = value.strip(b" \t").decode("latin-1")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdecimal() or len(length) > 15:
        raise Refused(HTTPStatus.BAD_REQUEST, "content-length is no number")
    if "transfer-encoding" in headers:
        raise Refused(HTTPStatus.NOT_IMPLEMENTED, "give content-length in place of transfer-encoding")
    if headers.get("content-encoding", "identity") != "identity":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the body as it is, without content-encoding")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise Refused(HTTPStatus.EXPECTATION_FAILED, "expect has another value than 100-continue")
    keeps = "close" not in headers.get("connection", "keep-alive" if found[3] == b"1" else "close").lower()
    path = found[2].partition(b"?")[0].decode("ascii")
    return Request(found[1].decode("ascii"), tuple(unquote(part) for part in path.split("/")[1:]), headers, keeps)


def head_of(response: Response, *, keeps: bool) -> bytes:
    """Return the bytes before a response's body."""
    size = sum(len(part) for part in response.parts)
    lines = [
        f"HTTP/1.1 {response.status.value} {response.status.phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {size}",
        f"Connection: {'keep-alive' if keeps else 'close'}",
        *(f"{name}: {value}" for name, value in response.headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
