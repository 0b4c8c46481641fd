# SPDX-License-Identifier: Apache-2.0
"""The saved form of fitted transforms: JSON, small enough to travel with a job.

    {"format": "oarlock-transforms", "version": 1, "schema": {...},
     "numbers": [[fill, center, scale], ...],                 one for each number of the schema
     "bounds": {"field": [...]}, "vocabularies": {"field": base64 of uint64 little-endian, ascending}}

Invariant: what is read back applies to the bit like what was saved; text from outside is hostile until checked. Any thread.
"""

import base64
import binascii
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from oarlock.data import schema as schema_form
from oarlock.data.categories import FIRST_HASH, Hashes
from oarlock.data.scaling import Scaling
from oarlock.data.schema_parts import Schema
from oarlock.data.transforms import Fitted
from oarlock.proto.errors import InvalidArgument

FORMAT = "oarlock-transforms"
VERSION = 1
MAX_BYTES = 16 << 20

_KEYS = {"format", "version", "schema", "numbers", "bounds", "vocabularies"}


def to_json(fitted: Fitted) -> str:
    """Return the JSON form."""
    names = fitted.fields
    sizes = sum(values.size for values in fitted.vocabularies.values())
    # Before the text is made: base64 needs 32 characters for 3 hashes.
    text = "" if sizes * 32 // 3 > MAX_BYTES else _text(fitted)
    if not text or len(text) > MAX_BYTES:
        largest = sorted(((values.size, names[i]) for i, values in fitted.vocabularies.items()), reverse=True)[:3]
        listed = ", ".join(f"{name}: {size:,}" for size, name in largest) or "none"
        raise InvalidArgument(
            f"the fitted transforms are over the limit of 16 MiB (values in the largest vocabularies: {listed}); raise "
            "vocabulary.min_count, lower vocabulary.max_size, or use hash or the values themselves for these fields"
        )
    return text


def from_json(text: str) -> Fitted:
    """Return the transforms of their JSON form; InvalidArgument names what does not fit."""
    if len(text) > MAX_BYTES:
        raise InvalidArgument(f"transforms: {len(text)} characters are over the limit of 16 MiB")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"transforms: not readable as JSON ({error}); restore what was saved") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InvalidArgument("transforms: not the saved form of fitted transforms; restore what was saved")
    if values.get("version") != VERSION:
        raise InvalidArgument(f"transforms: version {values.get('version')!r}, this Oarlock reads {VERSION}; fit again")
    if set(values) != _KEYS:
        raise InvalidArgument(f"transforms: expected exactly {', '.join(sorted(_KEYS))}")
    try:
        # JSON can write half a character, which is no text.
        json.dumps(values["schema"], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"transforms: schema: a name is no text ({error}); restore what was saved") from None
    schema = schema_form.from_values(values["schema"], "transforms: schema")
    return Fitted(
        schema,
        _scalings(schema, values["numbers"]),
        {i: _bounds(name, value) for i, name, value in _by_field(schema, values["bounds"], "bounds")},
        {i: _vocabulary(name, value) for i, name, value in _by_field(schema, values["vocabularies"], "vocabularies")},
    )


def _text(fitted: Fitted) -> str:
    names = fitted.fields
    values = {
        "format": FORMAT,
        "version": VERSION,
        "schema": schema_form.to_values(fitted.schema),
        "numbers": [[scaling.fill, scaling.center, scaling.scale] for scaling in fitted.scalings],
        "bounds": {names[i]: bounds.tolist() for i, bounds in fitted.bounds.items()},
        "vocabularies": {
            names[i]: base64.b64encode(values.astype("<u8").tobytes()).decode()
            for i, values in fitted.vocabularies.items()
        },
    }
    return json.dumps(values, separators=(",", ":"))


def _scalings(schema: Schema, values: Any) -> list[Scaling]:
    if not isinstance(values, list) or len(values) != len(schema.numbers):
        raise InvalidArgument(f"transforms: numbers: expected a list of {len(schema.numbers)}")
    found = []
    for number, value in zip(schema.numbers, values, strict=True):
        if not isinstance(value, list) or len(value) != 3 or not all(_is_number(one) for one in value) or value[2] <= 0:
            raise InvalidArgument(
                f"transforms: numbers {number.column}: expected [fill, center, scale], all finite, scale > 0"
            )
        fill, center, scale = (float(one) for one in value)
        found.append(Scaling(number.log, fill, center, scale))
    return found


def _by_field(schema: Schema, values: Any, part: str) -> list[tuple[int, str, Any]]:
    """Return (position, name, value) of the fields that have this part; each of them, and no other, must be there."""
    wanted = {
        field.name: i
        for i, field in enumerate(schema.fields)
        if (field.is_number if part == "bounds" else field.vocabulary is not None)
    }
    if not isinstance(values, dict) or set(values) != set(wanted):
        raise InvalidArgument(f"transforms: {part}: expected those of exactly the fields {sorted(wanted)[:8]}")
    return [(wanted[name], name, value) for name, value in values.items()]


def _bounds(name: str, value: Any) -> npt.NDArray[np.float32]:
    owner = f"transforms: bounds of {name}"
    if not isinstance(value, list) or not all(_is_number(one) for one in value):
        raise InvalidArgument(f"{owner}: expected a list of finite numbers")
    with np.errstate(over="ignore"):
        bounds = np.array(value, np.float32)
    if not np.isfinite(bounds).all() or (np.diff(bounds) <= 0).any():
        raise InvalidArgument(f"{owner}: expected finite float32 in ascending order")
    return bounds


def _vocabulary(name: str, value: Any) -> Hashes:
    owner = f"transforms: vocabulary of {name}"
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data or len(data) % 8:
        raise InvalidArgument(f"{owner}: expected base64 of one or more uint64")
    hashes = np.frombuffer(data, "<u8").astype(np.uint64)
    if hashes[0] < FIRST_HASH or (hashes[1:] <= hashes[:-1]).any():
        raise InvalidArgument(f"{owner}: expected hashes in ascending order, none below {FIRST_HASH}")
    return hashes


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )
