# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document of the HTTP side, made of the routes (rest.py) and of what each one takes and gives.

Invariant: it has every route and no other; what all refusals look like is said once. Pure.
"""

from http import HTTPStatus
from typing import Any

from oarlock import __version__
from oarlock.serving.rest import ROUTES, Route
from oarlock.serving.tensors import DATATYPES

_BINARY = "application/octet-stream"


def _object(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _of(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT, _FLAG, _COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
_SHAPE = _array({"type": "integer"})
_TYPE = {"type": "string", "enum": list(DATATYPES)}
_TENSOR = {"name": _TEXT, "datatype": _TYPE, "shape": _SHAPE}
_VALUES = {
    "type": "array",
    "description": "The values, row-major, flat or nested as the shape; null is missing. Not beside binary data.",
    "items": {},
}
_SIZE = _object({"binary_data_size": _COUNT})
SCHEMAS: dict[str, Any] = {
    "Live": _object({"live": _FLAG}, ("live",)),
    "Ready": _object({"ready": _FLAG}, ("ready",)),
    "ModelReady": _object({"name": _TEXT, "ready": _FLAG}, ("name", "ready")),
    "Server": _object(
        {"name": _TEXT, "version": _TEXT, "extensions": _array(_TEXT), "models": _array(_TEXT)},
        ("name", "version", "extensions"),
    ),
    "Described": _object(_TENSOR, tuple(_TENSOR)),
    "Metadata": _object(
        {
            "name": _TEXT,
            "versions": _array(_TEXT),
            "platform": _TEXT,
            "inputs": _array(_of("Described")),
            "outputs": _array(_of("Described")),
        },
        ("name", "versions", "platform", "inputs", "outputs"),
    ),
    "Input": _object({**_TENSOR, "parameters": _SIZE, "data": _VALUES}, tuple(_TENSOR)),
    "WantedOutput": _object({"name": _TEXT, "parameters": _object({"binary_data": _FLAG})}, ("name",)),
    "InferRequest": _object(
        {
            "id": _TEXT,
            "parameters": _object({"binary_data_output": _FLAG}),
            "inputs": _array(_of("Input")),
            "outputs": _array(_of("WantedOutput")),
        },
        ("inputs",),
    ),
    "Output": _object({**_TENSOR, "parameters": _SIZE, "data": _VALUES}, tuple(_TENSOR)),
    "InferResponse": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _TEXT,
            "parameters": _object(
                {"run": _COUNT, "cut": _COUNT, "seconds_since": {"type": "number"}, "missing": _COUNT}
            ),
            "outputs": _array(_of("Output")),
        },
        ("model_name", "model_version", "parameters", "outputs"),
    ),
    "Error": _object({"error": _TEXT}, ("error",)),
}
# By the route's answer: what it is for, and the schema of what comes back.
_SAYS = {
    "live": ("Whether the process lives. Open to everybody.", "Live"),
    "ready": ("Whether a model is open; 503 if it is not. Open to everybody.", "Ready"),
    "server": ("Who answers, and which models there are.", "Server"),
    "openapi": ("This document.", ""),
    "metadata": ("What a model takes and gives.", "Metadata"),
    "model_ready": ("Whether a model can be asked.", "ModelReady"),
    "infer": ("Predictions of the recipe's model, or rows by key of a table's.", "InferResponse"),
}
_REFUSALS = {
    400: "What was sent is wrong; nothing was computed.",
    401: "No token, or none that is known.",
    404: "There is no such model, or another version is served.",
    413: "More than one request may have.",
    429: "Too many requests a second.",
    500: "A defect in Oarlock.",
    503: "Not now, or overloaded: ask again in a moment.",
    504: "The time that a request may wait was over before its turn came.",
}


def description() -> dict[str, Any]:
    """Return the document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(path_of(route), {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Oarlock serving: the Open Inference Protocol over HTTP",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def path_of(route: Route) -> str:
    """Return a route's path as OpenAPI writes it."""
    return "/".join(["/v2", *(f"{{{part.lower()}}}" if part.isupper() else part for part in route.path)])


def _operation(route: Route) -> dict[str, Any]:
    says, schema = _SAYS[route.answer]
    values = [part.lower() for part in route.path if part.isupper()]
    name = route.answer + ("_of_version" if "version" in values else "")
    content = {"application/json": {"schema": _of(schema) if schema else {"type": "object"}}}
    made: dict[str, Any] = {"operationId": name, "summary": says, "security": [] if route.open else [{"token": []}]}
    if values:
        made["parameters"] = [{"name": v, "in": "path", "required": True, "schema": _TEXT} for v in values]
    if route.answer == "infer":
        length = {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "required": False,
            "description": "How many bytes of the body are JSON; the inputs' binary data follow.",
            "schema": _COUNT,
        }
        made["parameters"] = [*made["parameters"], length]
        binary = {_BINARY: {"schema": {"type": "string", "format": "binary"}}}
        asked = {"application/json": {"schema": _of("InferRequest")}, **binary}
        made["requestBody"] = {"required": True, "content": asked}
        content = {**content, **binary}
    made["responses"] = {"200": {"description": HTTPStatus.OK.phrase, "content": content}}
    for code, words in _REFUSALS.items():
        if not route.open or code in (400, 503):
            refusal = _of("Ready") if route.answer == "ready" and code == 503 else _of("Error")
            made["responses"][str(code)] = {"description": words, "content": {"application/json": {"schema": refusal}}}
    return made
