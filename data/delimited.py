# SPDX-License-Identifier: Apache-2.0
"""Conversion of one text file (csv, tsv; plain or compressed as .gz, .bz2, .zst, .lz4) to Parquet, by a schema.

Invariant: the target exists only whole: it is written beside its place and renamed into it. Every value that the schema reads
is checked on the way, and an error names the file and the line. Memory is bounded by a few blocks of text and one row
group. The row groups depend on the rows alone. Callable from any thread; two writers of one target write the same.

    csv: cut by commas, values may stand in double quotes; tsv: cut by tabs, no quotes. UTF-8, no line break within a value.
"""

import contextlib
import io
import os
import secrets
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from oarlock.data.columns import parse_numbers
from oarlock.data.schema_parts import Schema, check_known
from oarlock.proto.errors import InvalidArgument, NotFound

ROWS_PER_GROUP = 16_384
BLOCK_BYTES = 4 << 20
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")

_FLOAT_MAX = float(np.finfo(np.float32).max)


def convert_text(source: Path, target: Path, schema: Schema, progress: Callable[[int], None] | None = None) -> None:
    """Write the columns that the schema reads of a text file to a Parquet file; ``progress`` is told the rows so far."""
    partial = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        before = _stamp(source)
        _convert(_Source(source, schema), partial, progress)
        if _stamp(source) != before:
            raise InvalidArgument(f"{source}: the file changed while it was read; start again when it is complete")
        os.replace(partial, target)
    except FileNotFoundError:
        raise NotFound(f"{source}: no such file, or {target.parent} was removed; check both") from None
    except OSError as error:
        raise InvalidArgument(
            f"{source}: cannot be converted to {target} ({' '.join(str(error).split())}); is the one readable, and is there "
            "room for the other?"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class _Source:
    """A text file: its stream of batches, and where in it a row stands."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path = path
        self.schema = schema
        self._wrong: Any = None
        self._parse = csv.ParseOptions(
            delimiter="," if schema.format == "csv" else "\t",
            quote_char='"' if schema.format == "csv" else False,
            invalid_row_handler=self._note,
        )
        self._read = csv.ReadOptions(
            use_threads=False,
            block_size=BLOCK_BYTES,
            column_names=list(schema.columns) or None,
        )

    def batches(self) -> Generator[Any, None, None]:
        """Yield record batches of strings, the columns named as the schema has them."""
        try:
            with contextlib.ExitStack() as stack:
                named = self._names(stack)
                wanted = [there for there, name in named.items() if name in self.schema.kinds]
                convert = csv.ConvertOptions(
                    include_columns=wanted,
                    column_types=dict.fromkeys(wanted, pa.string()),
                    strings_can_be_null=False,
                )
                stream = stack.enter_context(self._open(stack, convert))
                for batch in stream:
                    yield pa.Table.from_batches([batch]).rename_columns([named[there] for there in wanted])
        except pa.ArrowInvalid as error:
            raise self._refused(error) from None

    def bad(self, row: int, what: str) -> InvalidArgument:
        """Return the error of a data row, counted from 0."""
        return InvalidArgument(f"{self.path}, line {self._line(row + (1 if self.schema.columns else 2))}: {what}")

    def _open(self, stack: contextlib.ExitStack, convert: Any) -> Any:
        file = stack.enter_context(pa.input_stream(str(self.path), compression="detect"))
        return csv.open_csv(file, read_options=self._read, parse_options=self._parse, convert_options=convert)

    def _names(self, stack: contextlib.ExitStack) -> dict[str, str]:
        """Return what the file's columns are called in the schema, by what they are called in the file."""
        if self.schema.columns:
            return {name: name for name in self.schema.columns}
        with self._open(stack, csv.ConvertOptions()) as stream:
            try:
                there = list(stream.schema.names)
            except UnicodeDecodeError:
                raise pa.ArrowInvalid("the names are not UTF-8") from None
        names = [name.strip() for name in there] if self.schema.trim else there
        check_known(str(self.path), self.schema.kinds, names)
        for name in self.schema.kinds:
            if names.count(name) > 1:
                raise InvalidArgument(f"{self.path}: column {name!r} appears {names.count(name)} times; rename one")
        return dict(zip(there, names, strict=True))

    def _note(self, row: Any) -> str:
        self._wrong = row
        return "error"

    def _refused(self, error: Exception) -> InvalidArgument:
        text = " ".join(str(error).split())
        if self._wrong is not None and self._wrong.number is not None:
            row = self._wrong
            advice = "correct the line; a schema with columns = [...] must name every column of the file"
            return InvalidArgument(
                f"{self.path}, line {self._line(row.number)}: {row.actual_columns} columns, expected {row.expected_columns}; "
                f"{advice}"
            )
        if "Empty CSV" in text:
            return InvalidArgument(f"{self.path}: the file is empty; give one with rows, or remove it")
        if "straddl" in text:
            return InvalidArgument(f"{self.path}: a line is longer than {BLOCK_BYTES:,} bytes; is this a text file?")
        if "UTF8" in text or "UTF-8" in text:
            return InvalidArgument(f"{self.path}{self._first_not_utf8()}: not UTF-8 text; convert the file")
        return InvalidArgument(f"{self.path}: not readable as {self.schema.format} ({text[:200]}); correct the file")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number, line) of the lines that are not empty, as the parser counts them."""
        with pa.input_stream(str(self.path), compression="detect") as file, io.BufferedReader(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.rstrip(b"\r\n"):
                    yield number, line

    def _line(self, place: int) -> int:
        """Return the number of the line that is the ``place``-th one, from 1, among those that are not empty."""
        for i, (number, _) in enumerate(self._lines(), 1):
            if i == place:
                return number
        return place

    def _first_not_utf8(self) -> str:
        for number, line in self._lines():
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f", line {number}"
        return ""


def _convert(source: _Source, partial: Path, progress: Callable[[int], None] | None) -> None:
    schema = source.schema
    types = {name: _type_of(kinds) for name, kinds in schema.kinds.items()}
    rows = 0
    held: list[Any] = []
    waiting = 0
    with (
        contextlib.closing(source.batches()) as batches,
        pq.ParquetWriter(partial, pa.schema(list(types.items())), compression="snappy") as writer,
    ):
        for table in batches:
            checked = _checked(source, table, rows, types)
            held.append(checked)
            rows += checked.num_rows
            waiting += checked.num_rows
            if waiting >= ROWS_PER_GROUP:
                whole = waiting - waiting % ROWS_PER_GROUP
                together = pa.concat_tables(held)
                writer.write_table(together.slice(0, whole), row_group_size=ROWS_PER_GROUP)
                held, waiting = [together.slice(whole)], waiting - whole
                if progress is not None:
                    progress(rows)
        if waiting:
            writer.write_table(pa.concat_tables(held), row_group_size=ROWS_PER_GROUP)
    if not rows:
        raise InvalidArgument(f"{source.path}: the file has a header line but no row; give one with rows, or remove it")
    if progress is not None:
        progress(rows)


def _type_of(kinds: tuple[str, ...]) -> Any:
    # A column that is read as a number and as a category stays text, so that its categories are the values as written.
    return pa.string() if "category" in kinds else pa.float32()


def _checked(source: _Source, table: Any, first: int, types: dict[str, Any]) -> Any:
    """Return a batch with missing values as null and numbers as numbers; ``first``: the row that it begins with."""
    schema = source.schema
    missing = pa.array(schema.missing, pa.string())
    columns = []
    for name, kind in types.items():
        texts = table.column(name)
        texts = (
            texts.chunk(0) if texts.num_chunks == 1 else pa.concat_arrays(texts.chunks or [pa.array([], pa.string())])
        )
        if schema.trim:
            texts = pc.utf8_trim_whitespace(texts)
        if len(missing):
            texts = pc.if_else(pc.is_in(texts, value_set=missing), pa.scalar(None, pa.string()), texts)

        def bad(row: int, what: str, name: str = name) -> InvalidArgument:
            return source.bad(first + row, f"column {name!r}: {what}")

        numbers = _numbers(texts, bad) if "number" in schema.kinds[name] or kind == pa.float32() else None
        if name == schema.label.column:
            _check_label(schema, texts, numbers, bad)
        columns.append(texts if numbers is None or kind == pa.string() else numbers)
    return pa.table(columns, schema=pa.schema(list(types.items())))


def _numbers(texts: Any, bad: Callable[[int, str], InvalidArgument]) -> Any:
    doubles = parse_numbers(texts, bad)
    values = doubles.to_numpy(zero_copy_only=False)
    outside = np.abs(values) > _FLOAT_MAX
    if outside.any():
        row = int(np.argmax(outside))
        raise bad(
            row, f"{texts[row].as_py()[:40]!r} is not a finite float32; correct it, or list it as missing in the schema"
        )
    return doubles.cast(pa.float32())


def _check_label(schema: Schema, texts: Any, numbers: Any, bad: Callable[[int, str], InvalidArgument]) -> None:
    """Raise for the first label that has no meaning."""
    if texts.null_count:
        raise bad(
            int(np.argmax(texts.is_null().to_numpy(zero_copy_only=False))), "the label is missing; leave the row out"
        )
    if numbers is not None:
        values = numbers.to_numpy(zero_copy_only=False)
        wrong = ~((values >= 0) & (values <= 1))
        advice = "is not in [0, 1]; say in the schema which values are positive"
    elif schema.label.negative:
        known = pa.array((*schema.label.positive, *schema.label.negative), pa.string())
        wrong = ~pc.is_in(texts, value_set=known).to_numpy(zero_copy_only=False)
        advice = "is neither positive nor negative in the schema"
    else:
        return
    if wrong.any():
        row = int(np.argmax(wrong))
        raise bad(row, f"the label {texts[row].as_py()[:40]!r} {advice}")
