# SPDX-License-Identifier: Apache-2.0
"""The reader of splits: one interface over petastorm and plain pyarrow.

Invariant: for the same split and columns every reader returns the same arrays in the same order, all rows of the split
in file order, or raises; a reader that loses rows is an error, never a shorter split. A reader belongs to one thread
at a time.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from oarlock.data.columns import Arrays, ColumnSpec, check_schema, decode
from oarlock.data.files import DataFile
from oarlock.data.splits import SplitPlan
from oarlock.proto.errors import InvalidArgument, NotFound

KINDS = ("petastorm", "arrow", "auto")


class Reader(Protocol):
    """Reads splits; ``name`` is ``petastorm`` or ``arrow``."""

    name: str

    def read(self, plan: SplitPlan, columns: Sequence[ColumnSpec]) -> Arrays:
        """Return the arrays of all rows of a split (forms: ``data/columns.py``)."""


class TableSource(Protocol):
    """What differs between readers: where the Arrow table of some row groups comes from."""

    def table(self, plan: SplitPlan, names: Sequence[str]) -> Any:
        """Return the Arrow table of a split's row groups with at least the named columns."""


class SplitReader:
    """The Reader over any TableSource: checks the file's columns, the number of rows, and every value."""

    def __init__(self, name: str, source: TableSource) -> None:
        self.name = name
        self._source = source

    def read(self, plan: SplitPlan, columns: Sequence[ColumnSpec]) -> Arrays:
        """Return the arrays of all rows of a split; the errors name file, row and column."""
        check_schema(plan.file.path, read_schema(plan.file.path), columns)
        try:
            table = self._source.table(plan, list(dict.fromkeys(column.name for column in columns)))
        except FileNotFoundError:
            raise NotFound(f"{plan.file.path}: the data file is gone; restore it") from None
        except (OSError, pa.ArrowException, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidArgument(
                f"{plan}: the {self.name} reader failed ({reason}); the file may be damaged: write it again"
            ) from error
        if table.num_rows != plan.rows:
            raise InvalidArgument(
                f"{plan}: the {self.name} reader returned {table.num_rows} rows where the footer says {plan.rows}: "
                "rows were lost or the file has changed; restore the file or use --reader arrow"
            )
        return decode(plan.file.path, plan.first_row, table, columns)


def read_schema(path: str) -> Any:
    """Return the Arrow schema of a Parquet file, from its footer."""
    try:
        # Not pq.read_schema: pyarrow 14 keeps a copy of the whole footer of every file that it was asked for.
        with pq.ParquetFile(path) as file:
            return file.schema_arrow
    except FileNotFoundError:
        raise NotFound(f"{path}: the data file is gone; restore it") from None
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(f"{path}: not a readable Parquet file ({reason}); replace the file") from None


def check_columns(files: Sequence[DataFile], columns: Sequence[ColumnSpec]) -> None:
    """Raise unless every file has the columns with types that fit, so that a job can be refused before it starts."""
    for file in files:
        check_schema(file.path, read_schema(file.path), columns)


def open_reader(kind: str) -> Reader:
    """Return a reader; ``auto`` takes petastorm where it works, else plain pyarrow, and ``.name`` tells which."""
    from oarlock.data import arrow_reader, petastorm_reader

    if kind not in KINDS:
        raise InvalidArgument(f"reader {kind!r}: choose one of {', '.join(KINDS)}")
    if kind != "arrow":
        problem = petastorm_reader.problem()
        if problem is None:
            return SplitReader("petastorm", petastorm_reader.PetastormTables())
        if kind == "petastorm":
            raise InvalidArgument(
                f"reader 'petastorm' cannot be used here ({problem}); install oarlock[petastorm] or use --reader arrow"
            )
    return SplitReader("arrow", arrow_reader.ArrowTables())
