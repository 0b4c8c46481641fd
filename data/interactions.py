# SPDX-License-Identifier: Apache-2.0
"""The data set form of recipes that learn who takes what: a folder of Parquet files and ``dataset.json``.

    train/part-*.parquet   user int64, item int64, in random order, row groups of a split's size
    test/part-*.parquet    user int64, item int64 (the positive), negatives list<int64>
    dataset.json           format, version, and the counts and figures of ``DatasetInfo``

Invariant: a folder with a ``dataset.json`` is complete: it is written beside its place and renamed into it. Callable
from any thread; two writers of one folder are not kept apart.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from oarlock.data.columns import Arrays, ColumnSpec, offsets_of
from oarlock.data.files import DataFile, list_files
from oarlock.data.negatives import Positives, group_positives
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.proto.errors import InvalidArgument, NotFound

FORMAT = "oarlock-interactions"
VERSION = 1
TRAIN_COLUMNS = (ColumnSpec("user", "key"), ColumnSpec("item", "key"))
TEST_COLUMNS = (*TRAIN_COLUMNS, ColumnSpec("negatives", "key_list"))
GROUPS_PER_FILE = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DatasetInfo:
    """Counts of a data set; ``figures`` holds what is known of it, such as the best HR@10 that was planted."""

    users: int
    items: int
    train_rows: int
    test_rows: int
    source: str
    seed: int
    figures: dict[str, float]


@dataclass(frozen=True)
class ListedItems:
    """Lists to rank, in file order: list r is of ``users[r]`` and holds ``items[offsets[r]:offsets[r + 1]]``, its
    positive first.
    """

    users: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.uint64]


def quiet(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


def list_train(dataset: str | os.PathLike[str]) -> tuple[DataFile, ...]:
    """Return the training files of a data set folder."""
    return list_files(_checked(dataset) / "train")


def list_test(dataset: str | os.PathLike[str]) -> tuple[DataFile, ...]:
    """Return the test files of a data set folder."""
    return list_files(_checked(dataset) / "test")


def read_info(dataset: str | os.PathLike[str]) -> DatasetInfo:
    """Return the ``dataset.json`` of a folder."""
    path = Path(os.path.abspath(dataset)) / "dataset.json"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(
            f"{path}: no such file; name a folder made by 'oarlock data import' or 'oarlock data generate'"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: not readable as JSON ({error}); make the data set again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InvalidArgument(f"{path}: not a data set of users and items; name another folder")
    if values.get("version") != VERSION:
        raise InvalidArgument(
            f"{path}: format version {values.get('version')!r}, this Oarlock reads {VERSION}; make the data set again"
        )
    names = [f.name for f in fields(DatasetInfo)]
    if any(name not in values for name in names):
        raise InvalidArgument(f"{path}: incomplete, expected {', '.join(names)}; make the data set again")
    return DatasetInfo(**{name: values[name] for name in names})


def load_positives(train: Sequence[DataFile]) -> Positives:
    """Return who has what, from the columns ``user`` and ``item`` of the training files."""
    parts = list(_read_all(train, TRAIN_COLUMNS))
    return group_positives(
        np.concatenate([part["user"] for part in parts]), np.concatenate([part["item"] for part in parts])
    )


def load_test(test: Sequence[DataFile]) -> ListedItems:
    """Return all test lists in file order."""
    parts = [to_lists(part) for part in _read_all(test, TEST_COLUMNS)]
    starts = np.cumsum([0, *(part.items.size for part in parts)])
    offsets = np.empty(sum(part.users.size for part in parts) + 1, np.int64)
    offsets[-1] = starts[-1]
    row = 0
    for part, start in zip(parts, starts[:-1], strict=True):
        offsets[row : row + part.users.size] = part.offsets[:-1] + start
        row += part.users.size
    return ListedItems(
        np.concatenate([part.users for part in parts]), offsets, np.concatenate([part.items for part in parts])
    )


def to_lists(part: Arrays) -> ListedItems:
    """Return the test lists of one split's arrays (TEST_COLUMNS): each positive put before its negatives."""
    rows = part["user"].size
    counts: npt.NDArray[np.int64] = part[offsets_of("negatives")]
    offsets = counts + np.arange(rows + 1, dtype=np.int64)
    items = np.empty(int(offsets[-1]), np.uint64)
    is_first = np.zeros(items.size, np.bool_)
    is_first[offsets[:-1]] = True
    items[is_first] = part["item"]
    items[~is_first] = part["negatives"]
    return ListedItems(part["user"], offsets, items)


def load_catalogue(train: Sequence[DataFile], test: Sequence[DataFile] = ()) -> npt.NDArray[np.uint64]:
    """Return uint64[I]: all distinct items, ascending, of the training files and of the test lists.

    The test lists belong to it: an item without a training row is still an item that can be drawn as a negative.
    """
    found = [np.unique(part["item"]) for part in _read_all(train, TRAIN_COLUMNS)]
    if test:
        found.append(np.unique(load_test(test).items))
    catalogue: npt.NDArray[np.uint64] = np.unique(np.concatenate(found))
    return catalogue


def rows_per_group(rows: int, groups: int, low: int, high: int) -> int:
    """Return the rows of a row group: about ``groups`` equal ones, each of ``low`` to ``high`` rows."""
    aim = min(max(math.ceil(rows / groups), low), high)
    return max(1, math.ceil(rows / math.ceil(rows / aim))) if rows else 1


def write_dataset(
    out_dir: str | os.PathLike[str], train: Any, test: Any, info: DatasetInfo, progress: Progress = quiet
) -> Path:
    """Write a data set of Arrow tables ``train`` (in training order) and ``test``, all or nothing; return its folder.

    A folder that holds an earlier data set is replaced; any other non-empty one is refused.
    """
    out = check_out_dir(out_dir)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (partial, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        _write_parts(partial / "train", train, rows_per_group(train.num_rows, 32, 1024, 65536), progress)
        _write_parts(partial / "test", test, rows_per_group(test.num_rows, 16, 256, 65536), progress)
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(info)}, indent=2)
        (partial / "dataset.json").write_text(text + "\n")
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except OSError as error:
        raise InvalidArgument(f"{out}: cannot be written ({error}); name a folder on a disk with room") from error
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return out


def check_out_dir(out_dir: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that may be written: new, empty, or an earlier data set."""
    out = Path(os.path.abspath(out_dir))
    if out.exists():
        if not out.is_dir():
            raise InvalidArgument(f"{out}: is a file; name a folder that is new or empty")
        if any(out.iterdir()):
            try:
                read_info(out)
            except (InvalidArgument, NotFound):
                raise InvalidArgument(f"{out}: not empty and not an earlier data set; name a new folder") from None
    return out


def _checked(dataset: str | os.PathLike[str]) -> Path:
    read_info(dataset)
    return Path(os.path.abspath(dataset))


def _read_all(files: Sequence[DataFile], columns: Sequence[ColumnSpec]) -> Iterator[Arrays]:
    reader = open_reader("arrow")
    for plan in plan_splits(files, 1 << 20):
        yield reader.read(plan, columns)


def _write_parts(folder: Path, table: Any, group: int, progress: Progress) -> None:
    folder.mkdir()
    step = group * GROUPS_PER_FILE
    for part, first in enumerate(range(0, max(table.num_rows, 1), step)):
        rows = table.slice(first, step)
        pq.write_table(rows, folder / f"part-{part:05d}.parquet", row_group_size=group, compression="snappy")
        progress(f"write {folder.name}", min(first + step, table.num_rows), table.num_rows)


def tabulate_test(
    users: npt.NDArray[np.int64],
    items: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    negatives: npt.NDArray[np.int64],
) -> Any:
    """Return the Arrow table of a test part: list r of ``negatives`` is ``offsets[r]:offsets[r + 1]``."""
    if offsets[-1] > np.iinfo(np.int32).max:
        raise InvalidArgument(f"{offsets[-1]} listed items are over the limit of 2^31 - 1; split the test lists")
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(negatives))
    return pa.table({"user": users, "item": items, "negatives": lists})
