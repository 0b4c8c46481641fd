# SPDX-License-Identifier: Apache-2.0
"""`oarlock checkpoint`: checkpoints checked, described and compared; one is made by checkpoint_now.py.

Invariant: nothing is changed; the result is standard output (for people, or one JSON object), progress and complaints are
standard error. One block is in memory at a time.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from oarlock.checkpoint.difference import Difference, compare
from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.format import MANIFEST, cut_folder
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.checkpoint.transforms_file import read_transforms
from oarlock.cli.show import result_console
from oarlock.launch.place import find, find_cut
from oarlock.proto.errors import CorruptCheckpoint, NotFound

Told = Callable[[int, int], None]
# Open splits whose marks a description for people has room for.
SHOWN = 8


def checkpoint(options: argparse.Namespace) -> int:
    """Run `oarlock checkpoint VERB`."""
    if options.verb == "now":
        from oarlock.cli.checkpoint_now import checkpoint_now

        return checkpoint_now(options)
    return {"verify": _verify, "describe": _describe, "diff": _diff}[str(options.verb)](options)


def _verify(options: argparse.Namespace) -> int:
    results = []
    for path in options.paths:
        known: dict[str, str] = {}
        for store, cut in _cuts_of(path, options.all):
            with _progress(f"{path}: cut {cut}") as told:
                results.append(_verify_cut(path, store, cut, known, told))
            if not options.json:
                _say_verified(results[-1])
    damaged = sum(not each["whole"] for each in results)
    if options.json:
        print(json.dumps({"cuts": results, "damaged": damaged}))
    return 1 if damaged else 0


def _cuts_of(path: str, all_cuts: bool) -> Iterator[tuple[CheckpointStore, int]]:
    """Yield the cuts that are to be verified: without a number the newest whole one, and those that are newer but damaged."""
    store, cut = find(path)
    if cut is not None:
        if not store.is_committed(cut):
            store.load_manifest(cut)  # says which there are
        yield store, cut
        return
    cuts = store.cuts()
    if not cuts:
        raise NotFound(f"no checkpoint in {store.files.root}")
    for cut in reversed(cuts):
        yield store, cut
        if not all_cuts and store.newest([cut]) is not None:
            return


def _verify_cut(path: str, store: CheckpointStore, cut: int, known: dict[str, str], told: Told) -> dict[str, Any]:
    errors: list[CorruptCheckpoint] = []
    manifest = None
    try:
        manifest = store.read_manifest(cut)
    except CorruptCheckpoint as error:
        older = store.newest(other for other in reversed(store.cuts()) if other < cut)
        errors.append(CorruptCheckpoint(error.message, file=f"{cut_folder(cut)}/{MANIFEST}", older=older and older.cut))
    if manifest is not None:
        errors += store.damage(manifest, known=known, progress=told)
        try:
            read_transforms(store.files, manifest)
        except CorruptCheckpoint as error:
            errors.append(CorruptCheckpoint(error.message, **{**error.details, "older": cut}))
        except NotFound:
            # Of jobs of older releases, and of those without any.
            pass
    return {
        "path": path,
        "cut": cut,
        "whole": not errors,
        "blocks": len(manifest.blocks) if manifest else 0,
        "bytes": sum(entry.total_bytes for entry in manifest.blocks) if manifest else 0,
        "damage": [
            {
                "file": error.details.get("file"),
                "columns": error.details.get("columns", []),
                "older": error.details.get("older"),
                "problem": str(error),
            }
            for error in errors
        ],
    }


def _say_verified(found: dict[str, Any]) -> None:
    if found["whole"]:
        print(f"{found['path']}: cut {found['cut']} is whole: {found['blocks']} blocks, {found['bytes']:,} bytes")
        return
    for each in found["damage"]:
        print(f"{found['path']}: damaged: {each['problem']}")
    olds = {each["older"] for each in found["damage"]}
    back = None if None in olds else min(olds)
    where = f"{found['path']}: cut {found['cut']} is damaged"
    if back == found["cut"]:
        print(f"{where} beside its blocks: it can be restored, but predictions want the job's folder")
    else:
        print(
            f"{where}: {'no older cut can be read' if back is None else f'go back to cut {back}, and verify it first'}"
        )


def _describe(options: argparse.Namespace) -> int:
    store, manifest = find_cut(options.paths[0])
    with _progress("marks", whole_numbers=True) as told:
        found = _description(store, manifest, told)
    if options.json:
        print(json.dumps(found))
        return 0
    console = result_console()
    _show_cuts(console, found["cuts"], manifest.cut)
    _show_tables(console, found)
    of = f"job {found['job']}, run {found['run']}, epoch {found['epoch']}, step {found['step']}"
    lines = [f"{found['recipe'] or 'no recipe'}; {of}, format {found['format_version']}"]
    closed = found["closed"]
    lines.append(
        f"splits closed: below {closed['floor']}, and {len(closed['above'])} above; open: {len(found['open_splits'])}"
    )
    for split, (low, high) in list(found["marks"].items())[:SHOWN]:
        lines.append(f"  split {split}: group {low if low == high else f'{low} to {high}'}")
    if len(found["marks"]) > SHOWN:
        lines.append(f"  and {len(found['marks']) - SHOWN} more (--json has all)")
    lines.append("metrics: " + (", ".join(f"{n} {v}" for n, v in _numbers(manifest).items()) or "none"))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _description(store: CheckpointStore, manifest: Manifest, told: Told) -> dict[str, Any]:
    marks: dict[int, list[int]] = {}
    for done, entry in enumerate(manifest.blocks, 1):
        for split, group in store.read_identity(manifest, entry).marks.items():
            marks.setdefault(split, []).append(group)
        told(done, len(manifest.blocks))
    return {
        "cuts": [_cut_line(store, cut) for cut in store.cuts()],
        **{
            name: getattr(manifest, name)
            for name in ("cut", "job", "run", "created", "seed", "recipe", "epoch", "step")
        },
        "format_version": manifest.format_version,
        "files": len(manifest.files),
        "closed": {"floor": manifest.closed.floor, "above": list(manifest.closed.above)},
        "open_splits": list(manifest.open_splits),
        "marks": {str(split): [min(groups), max(groups)] for split, groups in sorted(marks.items())},
        "metrics": manifest.metrics,
        "best": manifest.best,
        "tables": [_table_line(manifest, "rows", name, spec.dim) for name, spec in manifest.table_specs().items()],
        "dense": [_table_line(manifest, "dense", name, spec.size) for name, spec in manifest.dense_specs().items()],
    }


def _cut_line(store: CheckpointStore, cut: int) -> dict[str, Any]:
    manifest = store.newest([cut])
    if manifest is None:
        return {"cut": cut, "whole": False}
    own = [entry for entry in manifest.blocks if entry.folder == cut_folder(cut)]
    return {
        "cut": cut,
        "whole": True,
        "created": manifest.created,
        "run": manifest.run,
        "step": manifest.step,
        "written": sum(e.bytes + e.waiting_bytes + e.gone_bytes for e in own),
        "bytes": sum(entry.total_bytes for entry in manifest.blocks),
        "increments": sum(1 for entry in own if entry.base),
        "longest": max((len(entry.links) for entry in manifest.blocks), default=0),
        # What its evaluation found, of a cut right after an epoch.
        "metrics": _numbers(manifest),
    }


def _numbers(manifest: Manifest) -> dict[str, Any]:
    return {name: value for name, value in manifest.metrics.items() if isinstance(value, int | float | str)}


def _table_line(manifest: Manifest, kind: str, name: str, dim: int) -> dict[str, Any]:
    entries: list[BlockEntry] = [e for e in manifest.blocks if (e.kind, e.name) == (kind, name)]
    lengths = [len(entry.links) for entry in entries]
    return {
        "name": name,
        "dim" if kind == "rows" else "size": dim,
        "blocks": len(entries),
        # What an increment has may be in the whole file, too.
        "rows_at_most": sum(link.rows for entry in entries for link in entry.links),
        "rows_exact": max(lengths, default=1) == 1,
        "bytes": sum(entry.total_bytes for entry in entries),
        "chains": [min(lengths, default=0), max(lengths, default=0)],
        "seq": sum(entry.seq for entry in entries),
    }


def _show_cuts(console: Console, cuts: list[dict[str, Any]], chosen: int) -> None:
    table = Table(title="cuts (*: described below)", title_justify="left")
    names = list(dict.fromkeys(name for each in cuts for name in each.get("metrics", {})))[:SHOWN]
    for name in ("cut", "created", "run", "step", "written", "needs", "increments", "links", *map(escape, names)):
        table.add_column(name, justify="left" if name == "created" else "right", no_wrap=name == "created")
    for each in cuts:
        number = f"{each['cut']}{' *' if each['cut'] == chosen else ''}"
        if not each["whole"]:
            table.add_row(number, "damaged")
            continue
        values = [each[name] for name in ("run", "step", "written", "bytes", "increments", "longest")]
        told = [each["metrics"].get(name, "") for name in names]
        found = [f"{value:.4f}" if isinstance(value, float) else escape(str(value)) for value in told]
        table.add_row(number, each["created"][:16], *(f"{value:,}" for value in values), *found)
    console.print(table)


def _show_tables(console: Console, found: dict[str, Any]) -> None:
    table = Table(title=f"cut {found['cut']}", title_justify="left")
    for name in ("table", "dim", "blocks", "rows", "bytes", "links", "operations"):
        table.add_column(name, justify="left" if name == "table" else "right")
    for each in found["tables"] + found["dense"]:
        low, high = each["chains"]
        rows = f"{'' if each['rows_exact'] else '≤ '}{each['rows_at_most']:,}"
        dim = str(each.get("dim", "dense"))
        links = str(low) if low == high else f"{low} to {high}"
        table.add_row(each["name"], dim, f"{each['blocks']:,}", rows, f"{each['bytes']:,}", links, f"{each['seq']:,}")
    console.print(table)


def _diff(options: argparse.Namespace) -> int:
    before, after = (find_cut(path) for path in options.paths)
    with _progress("blocks", whole_numbers=True) as told:
        found = compare(before, after, told)
    if options.json:
        cuts = [{"path": path, "cut": side[1].cut} for path, side in zip(options.paths, (before, after), strict=True)]
        print(
            json.dumps({"cuts": cuts, "differs": any(d.differs for d in found), "tables": [d.as_json() for d in found]})
        )
        return 0
    table = Table(title=f"from cut {before[1].cut} to cut {after[1].cut}", title_justify="left")
    for name in ("table", "added", "removed", "changed", "same", "largest change"):
        table.add_column(name, justify="left" if name == "table" else "right")
    for each in found:
        table.add_row(*_diff_line(each))
    result_console().print(table)
    return 0


def _diff_line(each: Difference) -> list[str]:
    if each.problem:
        return [each.name, each.problem]
    largest = f"{each.largest:.6g}" + (f" (key {each.largest_key})" if each.largest_key is not None else "")
    rows = each.kind == "rows"
    counts = [
        f"{each.added:,}" if rows else "",
        f"{each.removed:,}" if rows else "",
        f"{each.changed:,}",
        f"{each.same:,}",
    ]
    return [each.name, *counts, largest]


@contextmanager
def _progress(what: str, *, whole_numbers: bool = False) -> Iterator[Told]:
    """Show how far it is, on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.completed}/{task.total}"),) if whole_numbers else (DownloadColumn(),)
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
    sys.stderr.flush()
