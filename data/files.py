# SPDX-License-Identifier: Apache-2.0
"""The list of data files of a job: path, size and the rows of every row group, as their footers say.

Invariant: the list is fixed when a job is created; a file that no longer matches it is an error that names the file.
Nothing here is cached: callable from any thread.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oarlock.proto.errors import InvalidArgument, NotFound


@dataclass(frozen=True)
class DataFile:
    """A Parquet file: absolute ``path``, ``size_bytes``, and the number of rows of each of its row groups."""

    path: str
    size_bytes: int
    row_groups: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


def read_file(path: str | os.PathLike[str]) -> DataFile:
    """Return the DataFile of one Parquet file, from its footer."""
    path = os.path.abspath(path)
    try:
        size = os.stat(path).st_size
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        raise NotFound(f"{path}: no such data file; check the path") from None
    except PermissionError:
        raise InvalidArgument(f"{path}: the data file cannot be read; grant read permission to this user") from None
    except (OSError, pa.ArrowException) as error:
        raise InvalidArgument(
            f"{path}: not a readable Parquet file ({_one_line(error)}); replace or remove the file"
        ) from None
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return DataFile(path, size, groups)


def list_files(source: str | os.PathLike[str]) -> tuple[DataFile, ...]:
    """Return the Parquet files of a directory (its ``*.parquet``, sorted by name, not of its subfolders) or one file.

    Names that start with '.' or '_' are left out, as writers use them for unfinished files and metadata.
    """
    root = Path(os.path.abspath(source))
    try:
        if root.is_file():
            return (read_file(root),)
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        raise NotFound(f"{root}: no such file or directory; check the path of the data") from None
    except NotADirectoryError:
        raise NotFound(f"{root}: a part of this path is not a directory; check the path of the data") from None
    except PermissionError:
        raise InvalidArgument(f"{root}: the directory cannot be read; grant read permission to this user") from None
    chosen = [name for name in names if name.endswith(".parquet") and name[0] not in "._"]
    paths = [root / name for name in chosen if not (root / name).is_dir()]
    if not paths:
        raise InvalidArgument(f"{root}: no *.parquet file in this directory; name the directory that holds them")
    return tuple(read_file(path) for path in paths)


def check_files(files: Sequence[DataFile]) -> None:
    """Raise unless every file still has the size and the row groups that were recorded."""
    for recorded in files:
        found = read_file(recorded.path)
        if found != recorded:
            raise InvalidArgument(
                f"{recorded.path}: the file has changed since the job was created: recorded {_describe(recorded)}, "
                f"found {_describe(found)}; restore the file or create a new job"
            )


def files_to_json(files: Sequence[DataFile]) -> list[dict[str, Any]]:
    """Return the list as JSON-ready values."""
    return [{"path": f.path, "size_bytes": f.size_bytes, "row_groups": list(f.row_groups)} for f in files]


def files_from_json(values: object) -> tuple[DataFile, ...]:
    """Return the list of its JSON form; InvalidArgument names what does not fit."""
    if not isinstance(values, list):
        raise InvalidArgument(f"data files: expected a list, got {type(values).__name__}")
    return tuple(_file_from_json(value, f"data files[{i}]") for i, value in enumerate(values))


def _file_from_json(value: object, owner: str) -> DataFile:
    if not isinstance(value, dict) or set(value) != {"path", "size_bytes", "row_groups"}:
        raise InvalidArgument(f"{owner}: expected an object with path, size_bytes and row_groups")
    path, size, groups = value["path"], value["size_bytes"], value["row_groups"]
    if not isinstance(path, str):
        raise InvalidArgument(f"{owner}.path = {path!r}: expected a string")
    if not _is_count(size):
        raise InvalidArgument(f"{owner}.size_bytes = {size!r}: expected an integer >= 0")
    if not isinstance(groups, list) or not all(_is_count(rows) for rows in groups):
        raise InvalidArgument(f"{owner}.row_groups: expected a list of integers >= 0")
    return DataFile(path, size, tuple(groups))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _describe(file: DataFile) -> str:
    return f"{file.size_bytes} bytes, {len(file.row_groups)} row groups, {file.rows} rows"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
