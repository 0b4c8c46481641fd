# SPDX-License-Identifier: Apache-2.0
"""The transforms of a schema: fitted once on the training data, saved with the model, applied to every batch of raw rows.

Invariant: ``Fitted.apply`` is a pure function of its arrays, row by row: the same raw row has the same numbers, keys and label
in every batch, process and machine, in training and in serving. A Fitted is immutable: callable from any thread.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oarlock.data.categories import NULL_CATEGORY, Hashes, hash_text, replace_codes
from oarlock.data.columns import Arrays, ColumnSpec, codes_of
from oarlock.data.field_keys import (
    add_to_cross,
    begin_cross,
    bucket_codes,
    field_salt,
    fold_codes,
    write_keys,
    write_plain_keys,
)
from oarlock.data.files import DataFile
from oarlock.data.quantiles import QuantileSample
from oarlock.data.reader import check_columns, open_reader
from oarlock.data.scaling import Scaling, add_moments, fit_scaling, scale_numbers
from oarlock.data.schema_parts import Field, Schema
from oarlock.data.splits import plan_splits
from oarlock.data.vocabulary import Counter, Membership, first_unlisted
from oarlock.proto.errors import InvalidArgument

Progress = Callable[[str, int, int], None]
ROWS_AT_ONCE = 1 << 16

_NO_BOUNDS = np.empty(0, np.float32)


class Features(NamedTuple):
    """A batch as a model takes it: dense: float32[n, width], keys: uint64[n, fields], label: float32[n], or [0] if not asked."""

    dense: npt.NDArray[np.float32]
    keys: npt.NDArray[np.uint64]
    label: npt.NDArray[np.float32]


class Fitted:
    """A schema and what was learnt from the training data.

    ``scalings``: one for each of the schema's numbers. ``bounds`` and ``vocabularies``: by the position of the field.
    """

    def __init__(
        self,
        schema: Schema,
        scalings: Sequence[Scaling],
        bounds: dict[int, npt.NDArray[np.float32]],
        vocabularies: dict[int, Hashes],
    ) -> None:
        self.schema = schema
        self.scalings = tuple(scalings)
        self.bounds = bounds
        self.vocabularies = vocabularies
        self._members = {i: Membership(values) for i, values in vocabularies.items()}
        # Read with every batch, and made of the schema each time that it is asked.
        self._columns = schema.specs
        self._inputs = tuple(spec for spec in self._columns if spec.name != schema.label.column)
        self._salts = [field_salt(field.name) for field in schema.fields]
        # Most of them: one pass writes their keys.
        self._plain = [not (one.is_number or one.is_cross or one.hash or one.vocabulary) for one in schema.fields]
        self._missing = _hashes_of(schema.missing)
        self._positive = _hashes_of(schema.label.positive)
        self._negative = _hashes_of(schema.label.negative)

    @property
    def columns(self) -> tuple[ColumnSpec, ...]:
        """Return the columns to read for training and evaluation."""
        return self._columns

    @property
    def inputs(self) -> tuple[ColumnSpec, ...]:
        """Return the columns without the label, as serving has them."""
        return self._inputs

    @property
    def width(self) -> int:
        """Return how many numbers a row has."""
        return len(self.schema.numbers)

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names of the categorical fields, in the order of the keys' columns."""
        return tuple(field.name for field in self.schema.fields)

    def apply(self, arrays: Arrays, label: bool = True) -> Features:
        """Return the features of raw rows, given as ``columns`` are read; ``label=False``: without their labels.

        An error names the column, and the row by its position in the arrays.
        """
        rows = self._check(arrays, self.columns if label else self.inputs)
        dense = np.empty((rows, self.width), np.float32)
        for i, (number, scaling) in enumerate(zip(self.schema.numbers, self.scalings, strict=True)):
            bad = int(scale_numbers(arrays[number.column], *scaling, dense, i))
            if bad >= 0:
                raise _bad(
                    number.column, bad, f"{arrays[number.column][bad]} cannot be scaled: it is far from all others"
                )
        keys = np.empty((rows, len(self.schema.fields)), np.uint64)
        cleaned: dict[str, Hashes] = {}
        for i, (field, salt) in enumerate(zip(self.schema.fields, self._salts, strict=True)):
            if self._plain[i]:
                codes = arrays[codes_of(field.columns[0])]
                write_plain_keys(codes, self._missing, NULL_CATEGORY, salt, keys, i)
            else:
                write_keys(self._codes(i, arrays, cleaned), salt, keys, i)
        return Features(dense, keys, self._label(arrays, rows) if label else np.empty(0, np.float32))

    def raw_codes(self, column: str, arrays: Arrays, cleaned: dict[str, Hashes]) -> Hashes:
        """Return the hashes of a categorical column, null where the schema says missing; ``cleaned`` keeps them."""
        if column not in cleaned:
            codes = arrays[codes_of(column)]
            cleaned[column] = np.empty_like(codes)
            replace_codes(codes, self._missing, NULL_CATEGORY, cleaned[column])
        return cleaned[column]

    def _codes(self, i: int, arrays: Arrays, cleaned: dict[str, Hashes]) -> Hashes:
        field = self.schema.fields[i]
        if field.is_number:
            values = arrays[field.columns[0]]
            out = np.empty(values.size, np.uint64)
            bucket_codes(values, self.bounds[i], out)
            return out
        if field.is_cross:
            out = self._cross(field, arrays, cleaned)
        else:
            out = self.raw_codes(field.columns[0], arrays, cleaned)
        if not field.hash and not field.vocabulary:
            return out
        codes, out = out, np.empty_like(out)
        if field.hash:
            fold_codes(codes, np.uint64(field.hash), out)
        else:
            self._members[i].keep(codes, out)
        return out

    def _cross(self, field: Field, arrays: Arrays, cleaned: dict[str, Hashes]) -> Hashes:
        out: Hashes | None = None
        for column in field.columns:
            bucket = self.schema.buckets_of(column)
            codes = self.raw_codes(column, arrays, cleaned) if bucket is None else self._codes(bucket, arrays, cleaned)
            if out is None:
                out = np.empty_like(codes)
                begin_cross(np.uint64(len(field.columns)), out)
            add_to_cross(codes, out)
        assert out is not None
        return out

    def _label(self, arrays: Arrays, rows: int) -> npt.NDArray[np.float32]:
        name = self.schema.label.column
        if self.schema.label.positive:
            label = np.empty(rows, np.float32)
            others = not self.schema.label.negative
            bad = int(first_unlisted(self.raw_codes(name, arrays, {}), self._positive, self._negative, others, label))
            if bad >= 0:
                what = "missing" if others else "missing, or neither positive nor negative in the schema"
                raise _bad(name, bad, f"the label is {what}; correct it, or leave the row out")
            return label
        label = arrays[name]
        outside = ~((label >= 0) & (label <= 1))
        if outside.any():
            bad = int(np.argmax(outside))
            raise _bad(
                name, bad, f"the label {label[bad]} is not in [0, 1]; say in the schema which values are positive"
            )
        return label

    def _check(self, arrays: Arrays, specs: Sequence[ColumnSpec]) -> int:
        rows = -1
        for spec in specs:
            name = codes_of(spec.name) if spec.kind == "category" else spec.name
            values = arrays.get(name)
            if values is None:
                raise InvalidArgument(f"column {spec.name!r} ({spec.kind}) is missing: read Fitted.columns")
            wanted = np.uint64 if spec.kind == "category" else np.float32
            if values.dtype != wanted or values.ndim != 1 or not values.flags.c_contiguous:
                raise InvalidArgument(
                    f"column {spec.name!r}: expected contiguous {np.dtype(wanted)}[rows], got {values.dtype}{values.shape}"
                )
            if rows >= 0 and values.size != rows:
                raise InvalidArgument(f"column {spec.name!r}: {values.size} rows, but others have {rows}")
            rows = values.size
        return rows

    def to_json(self) -> str:
        """Return the JSON form; InvalidArgument says what to do where it would be too large to be saved with a job."""
        from oarlock.data.transforms_text import to_json

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "Fitted":
        """Return the transforms of their JSON form; InvalidArgument names what does not fit."""
        from oarlock.data.transforms_text import from_json

        return from_json(text)


def fit(schema: Schema, files: Sequence[DataFile], progress: Progress | None = None) -> Fitted:
    """Fit a schema's transforms on Parquet files, in one pass; ``progress(stage, done, total)`` is told the rows.

    Memory is bounded by a row group and, for each vocabulary, by its distinct values, 4 million at most.
    """
    if not files:
        raise InvalidArgument("there is no training file to fit the schema's transforms on; check the path of the data")
    check_columns(files, schema.specs)
    plans = plan_splits(files, ROWS_AT_ONCE)
    total = sum(plan.rows for plan in plans)
    reader = open_reader("arrow")
    fitting = _Fitting(schema)
    for plan in plans:
        arrays = reader.read(plan, schema.specs)
        try:
            fitting.add(arrays)
        except InvalidArgument as error:
            raise InvalidArgument(f"{plan}: {error}", **error.details) from None
        if progress is not None:
            progress("fit", fitting.rows, total)
    return fitting.finish()


class _Fitting:
    """What has been seen of the training data so far."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.rows = 0
        self._positives = 0
        self._moments = [np.zeros(3, np.float64) for _ in schema.numbers]
        fields = list(enumerate(schema.fields))
        self._samples = {i: QuantileSample(field.name, i) for i, field in fields if field.quantiles}
        self._counters = {i: Counter(field.name) for i, field in fields if field.vocabulary}
        # Reads labels and raw codes as the finished one does.
        self._reader = Fitted(schema, (), {}, {})

    def add(self, arrays: Arrays) -> None:
        cleaned: dict[str, Hashes] = {}
        rows = arrays[next(iter(arrays))].size
        self._positives += int(np.count_nonzero(self._reader._label(arrays, rows)))
        for number, moments in zip(self._schema.numbers, self._moments, strict=True):
            add_moments(arrays[number.column], number.log, moments)
        for i, sample in self._samples.items():
            sample.add(self.rows, arrays[self._schema.fields[i].columns[0]])
        for i, counter in self._counters.items():
            counter.add(self._reader.raw_codes(self._schema.fields[i].columns[0], arrays, cleaned))
        self.rows += rows

    def finish(self) -> Fitted:
        if self._schema.label.positive and not self._positives:
            given = ", ".join(repr(value) for value in self._schema.label.positive[:8])
            raise InvalidArgument(
                f"label {self._schema.label.column}: none of {self.rows} rows is positive ({given}); look at the values of "
                "this column and correct label.positive in the schema"
            )
        scalings = []
        for number, moments in zip(self._schema.numbers, self._moments, strict=True):
            if not moments[0] and (number.fill is None or number.standardise):
                raise InvalidArgument(
                    f"numbers {number.column}: none of {self.rows} rows has a value; leave the column out"
                )
            scalings.append(
                fit_scaling(moments, logarithmic=number.log, standardise=number.standardise, fill=number.fill)
            )
        bounds: dict[int, Any] = {
            i: sample.bounds(self._schema.fields[i].quantiles) for i, sample in self._samples.items()
        }
        for i, field in enumerate(self._schema.fields):
            if field.bucketise:
                bounds[i] = np.array(field.bucketise, np.float32)
        vocabularies = {}
        for i, counter in self._counters.items():
            vocabulary = self._schema.fields[i].vocabulary
            assert vocabulary is not None
            vocabularies[i] = counter.kept(vocabulary.min_count, vocabulary.max_size)
            if not vocabularies[i].size:
                raise InvalidArgument(
                    f"fields {self._schema.fields[i].name}: no value occurs {vocabulary.min_count} times in {self.rows} rows; "
                    "lower vocabulary.min_count, or leave the field out"
                )
        return Fitted(self._schema, scalings, bounds, vocabularies)


def _hashes_of(values: Sequence[str]) -> Hashes:
    return np.array([hash_text(value) for value in values], np.uint64)


def _bad(column: str, row: int, what: str) -> InvalidArgument:
    return InvalidArgument(f"row {row} of these, column {column!r}: {what}", row=row, column=column)
