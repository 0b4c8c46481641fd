# SPDX-License-Identifier: Apache-2.0
"""`oarlock rows`: single rows of a running job, shown, exported, taken back.

Invariant: the result is standard output (a table for people, or one JSON object), all else is standard error; only `undo`
changes anything, and not before somebody said yes.
"""

import argparse
import asyncio
import difflib
import json
import random
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from oarlock import __version__
from oarlock.cli.jobs import asking
from oarlock.cli.rows_options import read_key
from oarlock.cli.show import result_console
from oarlock.client.rows import RowsClient, RowsPart
from oarlock.embedding.spec import TableSpec, to_json
from oarlock.export.rows_file import RowsFile
from oarlock.launch.folder import is_running, locate, read_spec
from oarlock.proto.errors import InvalidArgument, PSError, Unavailable, UnknownTable, WrongJob
from oarlock.proto.rpc import GrpcTransport
from oarlock.ps.rows import plain

Keys = NDArray[np.uint64]

# Keys that one command takes.
MAX_KEYS = 1 << 24
# Values of a row that a table for people has room for.
SHOWN = 6


def rows(options: argparse.Namespace) -> int:
    """Run `oarlock rows VERB`."""
    verbs: dict[str, Callable[[RowsClient, argparse.Namespace], Coroutine[Any, Any, int]]] = {
        "get": _get,
        "explain": _explain,
        "export": _export,
        "undo": _undo,
        "quarantine": _quarantine,
    }
    if options.verb == "export" and bool(options.all) == bool(options.keys):
        raise InvalidArgument("give either the keys to export, or --all")
    if options.verb == "undo" and "-" in options.keys and not options.yes:
        raise InvalidArgument("keys come from standard input, so nobody can be asked there: add --yes")
    options.keys = _read_keys(getattr(options, "keys", []))
    return asyncio.run(_with_client(options, verbs[options.verb]))


async def _with_client(
    options: argparse.Namespace, verb: Callable[[RowsClient, argparse.Namespace], Coroutine[Any, Any, int]]
) -> int:
    folder, address = locate(options.job)
    if address is None:
        assert folder is not None
        raise _away(options.job, folder)
    transport = GrpcTransport(security=asking(options, folder))
    try:
        job = b"" if folder is None else read_spec(folder).job_bytes
        client = RowsClient(transport, address, rng=random.SystemRandom(), job=job)
        try:
            await client.open()
        except PSError as error:
            # The address of a coordinator that is gone may be another job's by now.
            if folder is not None and (isinstance(error, WrongJob) or error.retryable):
                raise _away(options.job, folder, error) from None
            raise
        if options.table is not None and options.table not in client.layout.table_index:
            raise _unknown(client, options.table)
        return await verb(client, options)
    finally:
        await transport.close()


def _away(job: str, folder: Path, error: PSError | None = None) -> PSError:
    if not is_running(folder):
        return Unavailable(f"job {job} is not running: rows can be asked for while its shards live")
    if error is not None and not isinstance(error, WrongJob):
        return Unavailable(f"job {job} cannot be asked now: {error}")
    return Unavailable(
        f"job {job} runs in one process and has no address: train it without --in-process to ask for rows"
    )


def _unknown(client: RowsClient, name: str) -> UnknownTable:
    names = list(client.layout.table_index)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UnknownTable(f"job {client.spec.name} has no table {name!r}: {hint}it has {', '.join(names)}", table=name)


def _read_keys(given: list[Any]) -> Keys:
    """Return the keys, each once, in the order in which they were given first."""

    def each() -> Iterator[int]:
        for key in given:
            if key != "-":
                yield key
                continue
            for line in sys.stdin:
                for word in line.split():
                    try:
                        yield read_key(word)
                    except ValueError as error:
                        raise InvalidArgument(f"standard input: {error}") from None

    found: dict[int, None] = {}
    for key in each():
        found[key] = None
        if len(found) > MAX_KEYS:
            raise InvalidArgument(f"more than {MAX_KEYS} keys: ask for fewer at once, or export --all")
    if given and not found:
        raise InvalidArgument("standard input holds no key")
    return np.array(list(found), np.uint64)


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(plain(value), allow_nan=False))


def _short(values: list[float]) -> str:
    shown = " ".join(f"{v:.4g}" for v in values[:SHOWN])
    return f"{shown} ... ({len(values)})" if len(values) > SHOWN else shown


async def _get(client: RowsClient, options: argparse.Namespace) -> int:
    present, weights = await client.get(options.table, options.keys)
    found = zip(options.keys.tolist(), present.tolist(), weights, strict=True)
    if options.json:
        rows = [{"key": k, "present": p, "weights": w.tolist()} for k, p, w in found]
        _print({"job": client.spec.name, "table": options.table, "rows": rows})
        return 0
    table = Table("key", "present", "weights", title=f"{options.table} of {client.spec.name}", title_justify="left")
    for key, there, row in found:
        table.add_row(str(key), "yes" if there else "no", _short(row.tolist()), style=None if there else "dim")
    result_console().print(table)
    return 0


async def _explain(client: RowsClient, options: argparse.Namespace) -> int:
    found = await client.explain(options.table, options.keys)
    if options.json:
        _print({"job": client.spec.name, "table": options.table, "step": client.step, "rows": found})
        return 0
    console = result_console()
    for facts in found:
        title = f"key {facts.get('key')} of {options.table} in {client.spec.name}"
        table = Table("fact", "value", title=title, title_justify="left", show_header=False)
        for name, value in _flat(facts):
            table.add_row(name, value)
        console.print(table)
    return 0


def _flat(facts: dict[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, text) of facts, those within others under both names."""
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{within}{name}.")
        elif value not in (None, {}) and (within or name not in ("key", "table")):
            numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
            text = _short(value) if numbers else f"{value:.6g}" if isinstance(value, float) else str(value)
            yield within + name.replace("_", " "), text


async def _export(client: RowsClient, options: argparse.Namespace) -> int:
    spec = client.table(options.table)
    facts = {"job": client.spec.job, "name": client.spec.name, "run": client.run, "table": to_json(spec)}
    facts["oarlock"] = __version__
    blocks = spec.blocks if options.all else 0
    out = RowsFile(Path(options.out), spec, facts, force=options.force, hint=", or --force")
    with out as file, _progress() as progress:
        task = progress.add_task(f"exporting {options.table}", total=max(blocks, 1), rows=0)
        if options.all:
            for block in range(blocks):
                await _write(file, client.export_block(options.table, block))
                progress.update(task, advance=1, rows=file.rows)
        else:
            await _write(file, client.export(options.table, options.keys))
            progress.update(task, advance=1, rows=file.rows)
    absent = 0 if options.all else len(options.keys) - file.rows
    result = {"table": options.table, "file": str(file.path), "rows": file.rows, "absent": absent}
    result["bytes"] = file.path.stat().st_size
    if options.json:
        _print({"job": client.spec.name, **result})
    else:
        missing = f", {absent:,} keys have none" if absent else ""
        print(f"{file.path}: {file.rows:,} rows of {options.table}{missing}, {result['bytes']:,} bytes")
    return 0


async def _write(file: RowsFile, parts: AsyncIterator[RowsPart]) -> None:
    async for part in parts:
        file.write(part)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


async def _undo(client: RowsClient, options: argparse.Namespace) -> int:
    spec: TableSpec = client.table(options.table)
    kept = spec.guard.undo
    if not kept:
        raise InvalidArgument(
            f"table {spec.name} keeps no old values: only a job whose spec sets guard.undo = n can undo"
        )
    if not 1 <= options.steps <= kept:
        raise InvalidArgument(
            f"--steps {options.steps}: table {spec.name} keeps {kept} old values of a row; give 1 to {kept}"
        )
    if not options.yes:
        _confirm(
            f"take back the last {options.steps} updates of {len(options.keys)} keys of {spec.name} "
            f"while {client.spec.name} trains?"
        )
    done = await client.undo(options.table, options.keys, options.steps)
    found = list(zip(options.keys.tolist(), done.tolist(), strict=True))
    if options.json:
        rows = [{"key": key, "undone": undone} for key, undone in found]
        _print({"job": client.spec.name, "table": options.table, "steps": options.steps, "rows": rows})
        return 0
    table = Table("key", "updates taken back", title=f"{options.table} of {client.spec.name}", title_justify="left")
    for key, undone in found:
        table.add_row(str(key), str(undone), style=None if undone else "dim")
    result_console().print(table)
    return 0


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise InvalidArgument("this changes what the job learns, and nobody can be asked here: add --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InvalidArgument("nothing was taken back")


async def _quarantine(client: RowsClient, options: argparse.Namespace) -> int:
    names = [options.table] if options.table is not None else [t.name for t in client.spec.tables]
    found = {name: await client.quarantine(name) for name in names}
    if options.json:
        tables = {name: {"refused": refused, "sample": sample.tolist()} for name, (refused, sample) in found.items()}
        _print({"job": client.spec.name, "tables": tables})
        return 0
    table = Table("table", "refused", "some of their keys", title=f"gradients refused by {client.spec.name}")
    table.title_justify = "left"
    for name, (refused, sample) in found.items():
        keys = " ".join(map(str, sample[:SHOWN].tolist()))
        table.add_row(name, f"{refused:,}", keys + (f" ... ({len(sample)})" if len(sample) > SHOWN else ""))
    result_console().print(table)
    return 0
