# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.compress_rows [--json] [--quick] [--data FOLDER] [--seeds N]`: smaller rows, and what they cost.

A recipe is trained from several seeds in this process; of each checkpoint every method of `oarlock compress` makes a copy, whose
bytes, look-ups and metric on the test set are compared with those of the float32 rows. --data: tabular data with a schema, or
Frappe in libFM form (``frappe.*.libfm.zst``); without it generated clicks. Invariant: it writes to a temporary folder only, and
the last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.compress_rows")

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from oarlock.benchmarks.quality_data import generate_clicks
from oarlock.checkpoint.store import open_checkpoint
from oarlock.export.compress import compress, cost
from oarlock.export.evaluation import evaluate
from oarlock.export.method import Method
from oarlock.export.tables import dense_values
from oarlock.launch.config import run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.proto.errors import Unavailable
from oarlock.serving.snapshot import open_snapshot

STARTED = time.monotonic()
# Generated rows, epochs, seeds.
SIZES = {"full": (200_000, 4, 5), "quick": (40_000, 2, 1), "tiny": (2_000, 1, 1)}
METHODS = {
    "int8": Method("int8"),
    "int4": Method("int4"),
    "pq 8 bytes": Method("pq", parts=8),
    "pq 4 bytes": Method("pq", parts=4),
    "mixed 0.25, 4": Method("mixed", keep=0.25, parts=4),
    "mixed 0.1, 4": Method("mixed", keep=0.1, parts=4),
    "mixed 0.1, 8": Method("mixed", keep=0.1, parts=8),
    "mixed change": Method("mixed", keep=0.1, parts=4, by="change"),
    "prune to 0.75": Method("prune", keep=0.75),
    "prune to 0.5": Method("prune", keep=0.5),
}
_FRAPPE = {"train": "frappe.train.reconstructed.libfm.zst", "test": "frappe.test.libfm.zst"}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m oarlock.benchmarks.compress_rows", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="fewer rows, epochs and seeds: under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="tabular data, or Frappe (default: generated clicks)"
    )
    parser.add_argument("--recipe", default="dlrm", help="default dlrm")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the data")
    parser.add_argument("--seeds", type=int, metavar="N", help="jobs, from --seed on")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first one")
    options = parser.parse_args()
    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    rows, epochs, seeds = SIZES[size]

    def say(text: str) -> None:
        if not options.json:
            print(f"{time.monotonic() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="oarlock-bench-") as name:
        folder = Path(name)
        data = prepare(options.data, folder / "data", rows)
        settings = {"recipe": options.recipe, "data": str(data), "epochs": options.epochs or epochs}
        of_seeds = range(options.seed, options.seed + (options.seeds or seeds))
        found = [measure(folder / f"job-{seed}", {**settings, "seed": seed}, say) for seed in of_seeds]
    told = {name: _over_seeds([one["methods"][name] for one in found]) for name in METHODS}
    result = {
        "benchmark": "compress_rows",
        "int8_bytes_ratio": told["int8"]["bytes_ratio"],
        "int8_loss": told["int8"]["loss"],
        "metric": found[0]["metric"],
        "float32": statistics.mean(one["before"] for one in found),
        "methods": told,
        "data": options.data.name if options.data else f"{rows} generated clicks",
        "epochs": settings["epochs"],
        "seeds": len(found),
        "size": size,
        "surroundings": surroundings(("numpy", "numba")),
        "seconds": round(time.monotonic() - STARTED, 1),
    }
    for name, one in told.items():
        say(
            f"{name:<14} bytes {one['bytes_ratio']:.4f}  loss {one['loss']:+.5f} {one['losses']}  look-up {one['lookup_ratio']}"
        )
    print(json.dumps(result))
    return 0


def measure(folder: Path, settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Train one job; return what every method makes of it."""
    values = {**settings, "workers": 1, "servers": 1, "checkpoint_epochs": 0, "heartbeat_seconds": 0.1}
    spec = create(folder, "compress", run_config(values))
    # Of recipes' tables nothing counts how often a row is seen.
    spec = replace(spec, tables=tuple(replace(table, usage=True) for table in spec.tables))
    status = run_in_process(spec, folder, watch=lambda _: True)
    if status["phase"] != "done":
        raise Unavailable(f"the job ended as {status['phase']}: {status['reason']}")
    store, manifest = open_checkpoint(folder / "checkpoints")
    parameters, plain = dense_values(store, manifest), open_snapshot(store, manifest)
    metric = spec.metrics[0]
    before = evaluate(spec, plain.tables, parameters)[metric] or 0.0
    say(f"seed {settings['seed']}: {metric} {before:.5f}, {plain.rows:,} rows")
    methods = {}
    for number, (name, method) in enumerate(METHODS.items()):
        made = compress(store, manifest, dict.fromkeys(plain.tables, method), folder / f"copy-{number}")
        small = open_snapshot(made, made.load_manifest())
        after = evaluate(spec, small.tables, parameters)[metric] or 0.0
        costs = [(cost(plain.tables[table]), cost(small.tables[table])) for table in plain.tables]
        methods[name] = {
            "after": after,
            "loss": before - after,
            # Of rows alone: values and scales, without keys and index, which are the same for all forms.
            "bytes_ratio": sum(now.values_bytes for _, now in costs) / sum(was.values_bytes for was, _ in costs),
            "all_bytes_ratio": sum(now.bytes for _, now in costs) / sum(was.bytes for was, _ in costs),
            "lookup_ratio": sum(now.lookup_us for _, now in costs) / sum(was.lookup_us for was, _ in costs),
        }
    return {"metric": metric, "before": before, "methods": methods}


def _over_seeds(found: list[dict[str, float]]) -> dict[str, Any]:
    means = {name: statistics.mean(one[name] for one in found) for name in found[0]}
    losses = [round(one["loss"], 6) for one in found]
    rounded = {name: round(value, 6 if name in ("loss", "after") else 4) for name, value in means.items()}
    return {**rounded, "losses": losses}


def prepare(source: Path | None, folder: Path, rows: int) -> Path:
    """Return a folder of tabular data."""
    if source is None:
        generate_clicks(folder, rows)
        return folder
    if not (source / _FRAPPE["train"]).is_file():
        return source.resolve()
    folder.mkdir()
    for name, file in _FRAPPE.items():
        with pa.OSFile(str(source / file)) as opened, pa.CompressedInputStream(opened, "zstd") as stream:
            (folder / f"{name}.tsv").write_bytes(stream.read().replace(b" ", b"\t"))
    names = [f"f{n}" for n in range(1, 11)]
    fields = "".join(f'\n[[fields]]\ncolumn = "{name}"\n' for name in names)
    head = f'format = "tsv"\ncolumns = {json.dumps(["label", *names])}\n\n[label]\ncolumn = "label"\npositive = ["1"]\n'
    (folder / "schema.toml").write_text(head + fields, encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(main())
