# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol over HTTP: JSON, and tensors as bytes behind it (its binary tensor data extension).

Invariant: ``ROUTES`` is the only list of routes. Health answers everybody, everything else those who have a token, before a body
is taken; what is wrong is answered by {"error": ...} and a status of 400 and above, 500 for defects alone. Threads of the server.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple

from oarlock.proto import errors
from oarlock.proto.errors import Malformed, PSError, Unauthenticated, Unavailable
from oarlock.proto.rate import RateLimit
from oarlock.proto.roles import READ
from oarlock.proto.security import Security, presented_in
from oarlock.proto.work import Memory, Work
from oarlock.serving.http_request import Request, Response, error_response, json_response
from oarlock.serving.models import EXTENSIONS, MAX_ID, MAX_INPUTS, PLATFORM, SERVER, Answer, Described, Models, text_of
from oarlock.serving.tensors import Tensor, from_json, from_raw, to_raw

logger = logging.getLogger(__name__)

BINARY = "inference-header-content-length"
MAX_JSON_BYTES = 16 << 20
# How long a request may wait for memory and its turn.
PATIENCE_SECONDS = 30.0
_UNKNOWN = "this process answers those who give a token of its job: Authorization: Bearer TOKEN (docs/security.md)"

STATUS: dict[type[PSError], HTTPStatus] = {
    errors.InvalidArgument: HTTPStatus.BAD_REQUEST,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.UnknownTable: HTTPStatus.NOT_FOUND,
    errors.Unauthenticated: HTTPStatus.UNAUTHORIZED,
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
    errors.OutOfMemory: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
}


class Route(NamedTuple):
    """``path``: segments after /v2, NAME and VERSION stand for any. ``open``: answers without a token; ``counted``: is among what
    callers of role read may ask so many times a second."""

    method: str
    path: tuple[str, ...]
    answer: str
    open: bool = False
    counted: bool = True


_MODEL = ("models", "NAME")
_OF_VERSION = (*_MODEL, "versions", "VERSION")
ROUTES = (
    Route("GET", ("health", "live"), "live", open=True, counted=False),
    Route("GET", ("health", "ready"), "ready", open=True, counted=False),
    Route("GET", (), "server"),
    Route("GET", ("openapi.json",), "openapi"),
    *(Route("GET", path, "metadata") for path in (_MODEL, _OF_VERSION)),
    *(Route("GET", (*path, "ready"), "model_ready") for path in (_MODEL, _OF_VERSION)),
    *(Route("POST", (*path, "infer"), "infer", counted=False) for path in (_MODEL, _OF_VERSION)),
)


class Rest:
    """Answers for ``models``. ``memory``: what all requests of the process may take; ``description``: the OpenAPI document."""

    def __init__(self, models: Models, security: Security, memory: Memory, *, description: dict[str, Any]) -> None:
        self._models = models
        self._security = security
        self._memory = memory
        self._description = description
        self._limit = RateLimit(security.spec.read_requests_per_second)
        self.denied: Counter[str] = Counter()

    def admit(self, request: Request) -> Response | None:
        """Return what is answered to a head in place of what it asks for; None: its body may come."""
        route, _ = _routed(request)
        if route is not None and route.open:
            # From whom nothing is known, nothing is taken.
            words = "a question about health has no body"
            return error_response(HTTPStatus.BAD_REQUEST, words) if request.length else None
        try:
            self._let_in(request, route)
        except PSError as error:
            return _refusal(error)
        return None

    def _let_in(self, request: Request, route: Route | None) -> None:
        tokens = self._security.tokens
        if tokens is None:
            return
        presented = presented_in(request.headers.get("authorization", ""))
        role = None if presented is None else tokens.role_of(presented)
        if role is None:
            self.denied["token"] += 1
            raise Unauthenticated(_UNKNOWN)
        counted = route is None or route.counted
        if counted and role == READ and not self._limit.enter():
            self.denied["rate"] += 1
            raise _TooMany(
                f"callers of role {READ} ask this process for too many things a second: ask again in a moment"
            )

    def answer(self, request: Request) -> Response:
        """Return the response to a request that was let in."""
        route, values = _routed(request)
        try:
            if route is None:
                return _nowhere(request)
            with Work(self._memory, f"{request.method} {route.answer}", seconds=PATIENCE_SECONDS) as work:
                # The body, and what is made of it.
                work.copies = 2
                work.receives(2 * request.length)
                work.works()
                with work.here():
                    answer: Callable[..., Response] = getattr(self, f"_{route.answer}")
                    return answer(request, *values)
        except PSError as error:
            return _refusal(error)
        except MemoryError:
            return _refusal(errors.OutOfMemory("this process is out of memory"))
        except Exception:
            logger.exception("event=internal_error route=%s", route and route.answer)
            return error_response(HTTPStatus.INTERNAL_SERVER_ERROR, "a defect in Oarlock; its log says more")

    def _live(self, request: Request) -> Response:
        return json_response(HTTPStatus.OK, {"live": True})

    def _ready(self, request: Request) -> Response:
        ready = self._models.ready
        return json_response(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, {"ready": ready})

    def _server(self, request: Request) -> Response:
        known = {"name": SERVER, "version": self._models.server_version, "extensions": list(EXTENSIONS)}
        return json_response(HTTPStatus.OK, {**known, "models": self._models.names() if self._models.ready else []})

    def _openapi(self, request: Request) -> Response:
        return json_response(HTTPStatus.OK, self._description)

    def _model_ready(self, request: Request, name: str, version: str = "") -> Response:
        return json_response(HTTPStatus.OK, {"name": name, "ready": self._models.is_ready(name, version)})

    def _metadata(self, request: Request, name: str, version: str = "") -> Response:
        found = self._models.metadata(name, version)
        told = {"name": found.name, "versions": [found.version], "platform": PLATFORM}
        inputs, outputs = [_described(each) for each in found.inputs], [_described(each) for each in found.outputs]
        return json_response(HTTPStatus.OK, {**told, "inputs": inputs, "outputs": outputs})

    def _infer(self, request: Request, name: str, version: str = "") -> Response:
        asked = _Asked(request)
        return asked.response(self._models.infer(name, version, asked.inputs, list(asked.outputs)))


class _TooMany(Unavailable):
    """More requests than a second's."""


class _Asked:
    """A request for an inference: ``outputs``: by name, whether as bytes."""

    def __init__(self, request: Request) -> None:
        size = _json_size(request)
        try:
            values = json.loads(bytes(request.body[:size]))
        except (ValueError, RecursionError) as error:
            raise Malformed(f"the body is not readable as JSON: {str(error)[:200]}") from None
        if not isinstance(values, dict):
            raise Malformed("the body is no JSON object")
        self.identity = values.get("id", "")
        if not isinstance(self.identity, str) or len(self.identity) > MAX_ID:
            raise Malformed(f"id: give a string of {MAX_ID} characters at most")
        self._rest = request.body[size:]
        self.inputs = [self._tensor(each) for each in _objects(values, "inputs")]
        if self._rest:
            raise Malformed(f"{len(self._rest)} bytes are left behind the inputs' binary data")
        binary = _flag(_parameters(values), "binary_data_output")
        self.outputs: dict[str, bool] = {}
        for each in _objects(values, "outputs"):
            name = _text(each, "name")
            if name in self.outputs:
                raise Malformed(f"output {name[:200]!r} is asked for twice")
            self.outputs[name] = _flag(_parameters(each), "binary_data", binary)
        self._binary = binary

    def _tensor(self, value: dict[str, Any]) -> Tensor:
        name, datatype, shape = _text(value, "name"), _text(value, "datatype"), value.get("shape")
        if not isinstance(shape, list):
            raise Malformed(f"input {name[:200]!r}: shape is no list")
        size = _parameters(value).get("binary_data_size")
        if size is None:
            return from_json(name, datatype, shape, value.get("data"))
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(self._rest):
            raise Malformed(f"input {name[:200]!r}: there are no {str(size)[:40]} bytes of binary data left for it")
        if "data" in value:
            raise Malformed(f"input {name[:200]!r} has data beside binary data: give one of them")
        data, self._rest = self._rest[:size], self._rest[size:]
        return from_raw(name, datatype, shape, data)

    def response(self, found: Answer) -> Response:
        """Return the answer, with those outputs as bytes that are wanted so."""
        outputs, parts = [], []
        for tensor in found.outputs:
            told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            if self.outputs.get(tensor.name, self._binary):
                parts.append(to_raw(tensor))
                told["parameters"] = {"binary_data_size": len(parts[-1])}
            else:
                told["data"] = tensor.values.reshape(-1).tolist()
            outputs.append(told)
        known = {"model_name": found.name, "model_version": text_of(found.version)}
        known |= {"id": self.identity} if self.identity else {}
        try:
            made = json_response(HTTPStatus.OK, {**known, "parameters": found.parameters, "outputs": outputs})
        except ValueError:
            raise errors.InvalidArgument(
                "a value is not finite, which JSON has no form for: ask for binary data"
            ) from None
        if not parts:
            return made
        header = (("Inference-Header-Content-Length", str(len(made.parts[0]))),)
        return Response(made.status, (*made.parts, *parts), header, "application/octet-stream")


def _routed(request: Request) -> tuple[Route | None, list[str]]:
    """Return the route of a request, None: there is none, and what stands in the place of NAME and VERSION."""
    if request.path[:1] != ("v2",):
        return None, []
    path = request.path[1:-1] if request.path[-1] == "" else request.path[1:]
    for route in ROUTES:
        if route.method == request.method and _fits(route, path):
            return route, [given for said, given in zip(route.path, path, strict=True) if said.isupper()]
    return None, []


def _fits(route: Route, path: tuple[str, ...]) -> bool:
    return len(path) == len(route.path) and all(
        said == given or (said.isupper() and given != "") for said, given in zip(route.path, path, strict=True)
    )


def _nowhere(request: Request) -> Response:
    path = tuple(part for part in request.path if part)
    allowed = sorted({route.method for route in ROUTES if path[:1] == ("v2",) and _fits(route, path[1:])})
    if not allowed:
        return error_response(HTTPStatus.NOT_FOUND, "there is nothing here: /v2/openapi.json says what there is")
    words = f"{request.method} is not for this: {' or '.join(allowed)} is"
    return error_response(HTTPStatus.METHOD_NOT_ALLOWED, words, (("Allow", ", ".join(allowed)),))


def _refusal(error: PSError) -> Response:
    kind = next(kind for kind in type(error).__mro__ if kind in STATUS or kind is PSError)
    status = HTTPStatus.TOO_MANY_REQUESTS if isinstance(error, _TooMany) else STATUS.get(kind)
    if status is None:
        logger.error("event=internal_error error=%s: %s", type(error).__name__, error)
        status = HTTPStatus.INTERNAL_SERVER_ERROR
    headers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Unavailable):
        headers = (("Retry-After", "1"),)
    elif isinstance(error, Unauthenticated):
        headers = (("WWW-Authenticate", "Bearer"),)
    return error_response(status, error.message, headers)


def _json_size(request: Request) -> int:
    """Return how many bytes of a body are JSON."""
    text = request.headers.get(BINARY)
    size = len(request.body)
    if text is not None:
        if not text.isascii() or not text.isdecimal() or len(text) > 15 or int(text) > size:
            raise Malformed(f"Inference-Header-Content-Length: give an integer from 0 to {size}, the bytes of the body")
        size = int(text)
    if size > MAX_JSON_BYTES:
        raise errors.OutOfMemory(f"{size} bytes of JSON; the limit is {MAX_JSON_BYTES}: give binary tensor data")
    return size


def _objects(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise Malformed(f"{name}: give a list of objects")
    if len(found) > MAX_INPUTS:
        raise Malformed(f"{len(found)} {name}; the limit is {MAX_INPUTS}")
    return found


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise Malformed(f"{name}: give a string")
    return found


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    found = value.get("parameters", {})
    if not isinstance(found, dict):
        raise Malformed("parameters: give an object")
    return found


def _flag(parameters: dict[str, Any], name: str, default: bool = False) -> bool:
    found = parameters.get(name, default)
    if not isinstance(found, bool):
        raise Malformed(f"{name}: give true or false")
    return found


def _described(tensor: Described) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
