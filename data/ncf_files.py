# SPDX-License-Identifier: Apache-2.0
"""Import of rating files in the form of He et al., Neural Collaborative Filtering (WWW 2017).

    *.train.rating or *.train.tsv   user TAB item [TAB rating [TAB time]]; every row is a positive
    *.test.rating                   the same; one positive a line
    *.test.negative                 (user,item) TAB negative item TAB ...; line by line as test.rating

each plain or zstd-compressed (.zst). Invariant: nothing is written before every line was checked, and an error names
file and line. Training rows are shuffled by the seed: the files are sorted by user, and a split of neighbours would be
no sample of the data. Callable from any thread.
"""

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as csv

from oarlock.data.draws import IMPORT_ORDER
from oarlock.data.interactions import (
    DatasetInfo,
    Progress,
    check_out_dir,
    quiet,
    read_info,
    tabulate_test,
    write_dataset,
)
from oarlock.data.order import permutation
from oarlock.proto.errors import InvalidArgument, NotFound

MAX_ID = (1 << 63) - 1
Ids = npt.NDArray[np.int64]


class Negatives(NamedTuple):
    """Line r of a test.negative file: its pair, and ``items[offsets[r]:offsets[r + 1]]``."""

    users: Ids
    positives: Ids
    offsets: Ids
    items: Ids


def import_ncf(
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: Progress = quiet,
) -> DatasetInfo:
    """Write the data set of a folder of rating files to ``out_dir``; ``progress(stage, done, total)`` is told of it."""
    source = Path(os.path.abspath(source_dir))
    check_out_dir(out_dir)
    train_path = _find(source, (".train.rating", ".train.tsv"))
    test_path = _find(source, (".test.rating",))
    negative_path = _find(source, (".test.negative",))
    progress("read", 0, 3)
    users, items = read_ratings(train_path)
    progress("read", 1, 3)
    test_users, test_items = read_ratings(test_path)
    progress("read", 2, 3)
    negatives = read_negatives(negative_path)
    progress("read", 3, 3)
    _check_pairs(test_path, test_users, test_items, negative_path, negatives)
    order = permutation(users.size, IMPORT_ORDER, seed)
    train = pa.table({"user": users[order], "item": items[order]})
    test = tabulate_test(test_users, test_items, negatives.offsets, negatives.items)
    info = DatasetInfo(
        users=np.union1d(users, test_users).size,
        items=np.unique(np.concatenate([np.unique(items), test_items, np.unique(negatives.items)])).size,
        train_rows=users.size,
        test_rows=test_users.size,
        source="import ncf",
        seed=seed,
        figures={},
    )
    return read_info(write_dataset(out_dir, train, test, info, progress))


def read_ratings(path: Path) -> tuple[Ids, Ids]:
    """Return (users, items), both int64[n], of a rating file with 2 to 4 columns."""
    data = _read(path)
    width = _first_line(data).count(b"\t") + 1
    if 2 <= width <= 4:
        names = [f"f{i}" for i in range(width)]
        columns = _parse_quickly(data, names, {"f0": pa.int64(), "f1": pa.int64()}, ["f0", "f1"])
        if columns is not None and min(columns[0].min(), columns[1].min()) >= 0:
            return columns[0], columns[1]
    pairs = []
    for number, fields in _lines(data):
        if not 2 <= len(fields) <= 4:
            raise _bad(path, number, f"{len(fields)} columns; expected user, item and at most two more, cut by tabs")
        pairs.append((_id(path, number, "user", fields[0]), _id(path, number, "item", fields[1])))
    if not pairs:
        raise InvalidArgument(f"{path}: the file is empty; expected lines of user TAB item")
    both = np.array(pairs, np.int64)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def read_negatives(path: Path) -> Negatives:
    """Return the pairs and lists of a test.negative file."""
    data = _read(path)
    width = _first_line(data).count(b"\t")
    # The pair's brackets become tabs, so that one pass of the column parser reads everything.
    flat = data.translate(bytes.maketrans(b"(,", b"\t\t"), b")")
    names = ["", *(f"f{i}" for i in range(width + 2))]
    wanted = names[1:]
    columns = _parse_quickly(flat, names, dict.fromkeys(wanted, pa.int64()), wanted) if width else None
    if columns is not None and _has_pairs(data, columns[0].size) and min(c.min() for c in columns) >= 0:
        rows = columns[0].size
        items = np.stack(columns[2:], axis=1).reshape(-1)
        return Negatives(columns[0], columns[1], np.arange(rows + 1, dtype=np.int64) * width, items)
    return _read_negative_lines(path, data)


def _read_negative_lines(path: Path, data: bytes) -> Negatives:
    pairs: list[tuple[int, int]] = []
    lists: list[int] = []
    offsets = [0]
    for number, fields in _lines(data):
        pair = fields[0].strip()
        parts = pair[1:-1].split(",")
        if len(parts) != 2 or pair[0] != "(" or pair[-1] != ")":
            raise _bad(path, number, f"{pair!r}: expected (user,item) before the first tab")
        pairs.append((_id(path, number, "user", parts[0]), _id(path, number, "item", parts[1])))
        lists.extend(_id(path, number, "negative item", field) for field in fields[1:] if field.strip())
        if len(lists) == offsets[-1]:
            raise _bad(path, number, "no negative item; expected items after the first tab")
        offsets.append(len(lists))
    if not pairs:
        raise InvalidArgument(f"{path}: the file is empty; expected lines of (user,item) TAB negative items")
    both = np.array(pairs, np.int64)
    return Negatives(
        np.ascontiguousarray(both[:, 0]),
        np.ascontiguousarray(both[:, 1]),
        np.array(offsets, np.int64),
        np.array(lists, np.int64),
    )


def _check_pairs(test_path: Path, users: Ids, items: Ids, negative_path: Path, negatives: Negatives) -> None:
    if negatives.users.size != users.size:
        raise InvalidArgument(
            f"{negative_path}: {negatives.users.size} lines, but {test_path.name} has {users.size}; "
            "the two files must go line by line"
        )
    different = (negatives.users != users) | (negatives.positives != items)
    if different.any():
        row = int(np.argmax(different))
        raise _bad(
            negative_path,
            row + 1,
            f"is of ({negatives.users[row]},{negatives.positives[row]}), but the same line of {test_path.name} is of "
            f"({users[row]},{items[row]}); the two files must go line by line",
        )


def _find(source: Path, endings: tuple[str, ...]) -> Path:
    try:
        names = sorted(os.listdir(source))
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{source}: no such directory; name the folder that holds the rating files") from None
    except PermissionError:
        raise InvalidArgument(f"{source}: the directory cannot be read; grant read permission to this user") from None
    found = [name for name in names if name[0] != "." and name.removesuffix(".zst").endswith(endings)]
    wanted = " or ".join(f"*{ending}[.zst]" for ending in endings)
    if not found:
        raise NotFound(f"{source}: no file {wanted}; name the folder that holds the rating files")
    if len(found) > 1:
        raise InvalidArgument(f"{source}: {len(found)} files {wanted} ({', '.join(found)}); keep one of them")
    return source / found[0]


def _read(path: Path) -> bytes:
    try:
        with pa.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as stream:
            data: bytes = stream.read()
            return data
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(f"{path}: cannot be read ({reason}); replace the file") from None


def _first_line(data: bytes) -> bytes:
    return io.BytesIO(data).readline().rstrip(b"\r\n")


def _parse_quickly(data: bytes, names: list[str], types: dict[str, object], wanted: list[str]) -> list[Ids] | None:
    """Return the wanted columns, or None where the lines must be looked at one by one to say what is wrong."""
    try:
        table = csv.read_csv(
            pa.BufferReader(data),
            read_options=csv.ReadOptions(column_names=names, use_threads=False, block_size=max(len(data), 1 << 20)),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=csv.ConvertOptions(column_types=types, include_columns=wanted),
        )
    except pa.ArrowException:
        return None
    columns = [table.column(name) for name in wanted]
    if not table.num_rows or any(column.null_count for column in columns):
        return None
    return [np.array(column.to_numpy()) for column in columns]


def _has_pairs(data: bytes, rows: int) -> bool:
    """Tell whether each line can have brackets and a comma where a pair has them: three in all, and first a bracket."""
    return (
        data[:1] == b"("
        and data.count(b"\n(") == rows - 1
        and data.count(b")\t") == rows
        and all(data.count(sign) == rows for sign in (b"(", b",", b")"))
    )


def _lines(data: bytes) -> list[tuple[int, list[str]]]:
    lines = data.decode("utf-8", "replace").splitlines()
    return [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]


def _id(path: Path, number: int, what: str, text: str) -> int:
    text = text.strip()
    if not text.removeprefix("-").isdecimal() or not text.isascii():
        raise _bad(path, number, f"{what} {text!r} is not an integer")
    value = int(text)
    if not 0 <= value <= MAX_ID:
        raise _bad(path, number, f"{what} {value} is outside 0 to 2^63 - 1")
    return value


def _bad(path: Path, number: int, what: str) -> InvalidArgument:
    return InvalidArgument(f"{path}, line {number}: {what}")
