# SPDX-License-Identifier: Apache-2.0
"""A folder of tabular data: schema.toml, and training and test files in the form that it names.

    schema.toml                            what the columns are (docs/data.md)
    train.csv, train.1.csv ... or train/   csv, tsv (plain or compressed) or parquet, in the order of their names
    test.csv ... or test/                  the same; may be absent

Text is converted once to Parquet under a cache folder, since a split is a run of row groups. Invariant: a converted file is
named after a digest of all that it depends on (path, size and time of change of the text; what the schema says of reading),
so it is never out of date; it may be deleted whenever no job reads it. Callable from any thread.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from oarlock.data.delimited import COMPRESSIONS, convert_text
from oarlock.data.files import DataFile, read_file
from oarlock.data.reader import check_columns
from oarlock.data.schema import load_schema
from oarlock.data.schema_parts import Schema
from oarlock.proto.errors import InvalidArgument, NotFound, PSError

Progress = Callable[[str, int, int], None]

# Goes up when a conversion would give another file.
CONVERSION = 1


def tabular_files(
    folder: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> tuple[Schema, tuple[DataFile, ...], tuple[DataFile, ...]]:
    """Return the schema, the training files and the evaluation files (perhaps none) of a folder, all as Parquet.

    ``cache``: where converted text goes; by default under ``$XDG_CACHE_HOME`` or ``~/.cache``, or, where that cannot be
    written, under the temporary folder. ``progress(stage, done, total)`` is told the files.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise NotFound(f"{root}: no such folder; name one that holds schema.toml and train.* or train/")
    schema = load_schema(root / "schema.toml")
    train, test = _find(root, "train", schema.format), _find(root, "test", schema.format)
    if not train:
        raise NotFound(
            f"{root}: no file train.{schema.format} and no folder train/; give the training data one of these names"
        )
    if schema.format != "parquet":
        base = Path(os.path.abspath(cache)) if cache is not None else cache_folder()
        total = len(train) + len(test)
        train = [_converted(path, base, schema, progress, i, total) for i, path in enumerate(train)]
        test = [_converted(path, base, schema, progress, i, total) for i, path in enumerate(test, len(train))]
    files = tuple(read_file(path) for path in train)
    evaluation = tuple(read_file(path) for path in test)
    check_columns((*files, *evaluation), schema.specs)
    for part, found in (("training", files), ("test", evaluation)):
        if found and not sum(file.rows for file in found):
            raise InvalidArgument(f"{root}: the {part} files hold no row; give files with rows, or remove them")
    return schema, files, evaluation


def cache_folder() -> Path:
    """Return the folder of converted files, made if need be."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for base in (Path(home) / "oarlock", Path(tempfile.gettempdir()) / f"oarlock-{os.getuid()}"):
        folder = base / "tabular"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise InvalidArgument(
        f"no folder can be written for converted text: tried {home} and {tempfile.gettempdir()}; set XDG_CACHE_HOME"
    )


def _find(root: Path, part: str, form: str) -> list[Path]:
    """Return the files of ``train`` or ``test``, by name: those in the folder of this name, or PART.*FORMAT beside it."""
    endings = (f".{form}", *(f".{form}{ending}" for ending in COMPRESSIONS if form != "parquet"))
    inside = root / part
    try:
        beside = [name for name in sorted(os.listdir(root)) if name.startswith(f"{part}.")]
        names = [name for name in sorted(os.listdir(inside)) if name[0] not in "._"] if inside.is_dir() else []
    except OSError as error:
        raise InvalidArgument(f"{root}: the folder cannot be read ({error.strerror}); grant read permission") from None
    if beside and inside.is_dir():
        raise InvalidArgument(f"{root}: has both {beside[0]} and the folder {part}/; keep one of them")
    where = root if beside else inside
    for name in beside or names:
        if not name.endswith(endings):
            raise InvalidArgument(
                f"{where / name}: expected a name that ends in {' or '.join(endings)}, as schema.toml says format = {form!r}; "
                "rename the file, or correct the format"
            )
    if inside.is_dir() and not names:
        raise InvalidArgument(f"{inside}: no file in this folder; put *.{form} there, or remove it")
    return [where / name for name in beside or names]


def _converted(source: Path, base: Path, schema: Schema, progress: Progress | None, done: int, total: int) -> Path:
    """Return the Parquet file of a text file, converted now if it is not there yet."""
    name = source.name
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    # The text's name is in the path, for the errors of whoever reads it.
    target = base / _digest(source, schema) / f"{name}.parquet"
    if not _is_whole(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(f"{target.parent}: cannot be made ({error.strerror}); set XDG_CACHE_HOME") from None
        convert_text(source, target, schema)
    if progress is not None:
        progress("convert", done + 1, total)
    return target


def _is_whole(path: Path) -> bool:
    try:
        read_file(path)
    except PSError:
        return False
    return True


def _digest(source: Path, schema: Schema) -> str:
    try:
        status = source.stat()
    except OSError as error:
        raise InvalidArgument(f"{source}: cannot be read ({error.strerror}); check the file") from None
    label = schema.label
    parts = [
        CONVERSION,
        str(source),
        status.st_size,
        status.st_mtime_ns,
        schema.format,
        schema.columns,
        schema.missing,
        schema.trim,
        schema.kinds,
        (label.column, label.positive, label.negative),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
