# SPDX-License-Identifier: Apache-2.0
"""`oarlock serve`: rows and predictions of a checkpoint for other programs; and what a server that runs is asked by people.

Invariant: addresses and the line that says it is ready go to standard output, flushed; progress goes to standard error, as one
moving line on a terminal and as lines now and then elsewhere.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from oarlock.checkpoint.cuts import split_cut
from oarlock.checkpoint.place import place_of
from oarlock.checkpoint.reading import Reading
from oarlock.client.entry import read_address
from oarlock.client.security import security_of
from oarlock.launch.folder import locate as find_job
from oarlock.launch.folder import read_spec, stored_security
from oarlock.launch.kernels import are_compiled
from oarlock.launch.prediction import NoPrediction, job_beside, predictor_of, predictor_of_job, scorers
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.rpc import BlockingTransport
from oarlock.proto.rpc.server import check_address
from oarlock.proto.security import Security
from oarlock.proto.serving_pb2 import ModelReply
from oarlock.serving.client import Client
from oarlock.serving.compressed import locate_served
from oarlock.serving.follow import Following
from oarlock.serving.fronting import Fronting, FrontingJob
from oarlock.serving.nearest import load_faiss
from oarlock.serving.part import WHOLE, ModelPart, read_part
from oarlock.serving.predictor import Predictor
from oarlock.serving.process import Settings, run
from oarlock.serving.recall import RecallSpec, check_recall, read_recall
from oarlock.serving.remote import RemoteModel, RowServers
from oarlock.serving.snapshot import Model, Snapshot
from oarlock.serving.snapshot import Progress as Told
from oarlock.serving.swap import Serving
from oarlock.telemetry.log import to_stream

# Where there is no terminal, how far it is is told in lines, so often.
SAY_SECONDS = 2.0
CHECKPOINTS = "checkpoints"


def serve(options: argparse.Namespace) -> int:
    """Run a server, or ask one."""
    if options.verb == "run":
        return _run(options)
    address = options.address if len(options.address) > 1 else options.address[0]
    with Client(address, security=security_of(options)) as client:
        found = client.rollback(options.cut, newest=options.newest) if options.verb == "rollback" else client.describe()
    print(json.dumps(_facts(found)) if options.json else _text(found, together=len(options.address) > 1))
    return 0


def _run(options: argparse.Namespace) -> int:
    part = _part(options)
    if options.follow:
        return _follow(options, part)
    path, job = _checkpoints_of(options.checkpoint)
    security = security_of(options, stored_security(job))
    check_address(options.listen)
    security.check_listen(options.listen, "--listen")
    if options.http:
        security.check_listen(options.http, "--http")
    store, cut = locate_served(path)
    # Before anybody is told of an address: whether there is such a cut.
    store.load_manifest(cut)
    if options.rows_at and cut is not None:
        raise InvalidArgument(f"@{cut} does not go with --rows-at: the cut is that which the servers of rows serve")
    folder = Path(options.job) if options.job else job or job_beside(path)

    def predicts(model: Model) -> Predictor | None:
        opened = model.base if isinstance(model, RemoteModel) else model
        assert isinstance(opened, Snapshot)
        manifest = opened.manifest
        return _predictor(
            options,
            part,
            lambda threads: predictor_of(
                manifest, files=store.files, job=folder, recipe=options.recipe, scorers=threads
            ),
        )

    serving = None
    if options.rows_at:
        serving = Fronting(store, RowServers(options.rows_at, security=security), trust=options.trust)
    return _serve(options, store, security, part, cut=cut, predicts=predicts, serving=serving)


def _predictor(options: argparse.Namespace, part: ModelPart, make: Callable[[int], Predictor]) -> Predictor | None:
    """Return what ``make`` makes for so many threads, None, once it is said why, if there are no predictions."""
    if options.recipe == "none" or not part.whole:
        return None
    try:
        return make(options.predict_threads or scorers(waiting=bool(options.rows_at)))
    except NoPrediction as error:
        print(f"rows alone, no predictions: {error}", file=sys.stderr, flush=True)
        return None


def _part(options: argparse.Namespace) -> ModelPart:
    """Return which part of a model is to be served; InvalidArgument names an option that goes with all of a model alone."""
    part = read_part(options.part) if options.part else WHOLE
    if options.rows_at:
        for name, given in {
            "--part": options.part,
            "--recall": options.recall,
            "--follow-cuts": options.follow_cuts,
        }.items():
            if given:
                raise InvalidArgument(f"{name} does not go with --rows-at: rows are had by the servers there")
    recipe = "" if options.recipe == "none" else options.recipe
    whole = {"--job": options.job, "--recipe": recipe, "--http": options.http}
    if not part.whole:
        for name, given in {**whole, "--predict-threads": options.predict_threads}.items():
            if given:
                raise InvalidArgument(
                    f"{name} goes with all of a model: {part} gives rows and nearest rows, to clients that have all parts"
                )
    return part


def _follow(options: argparse.Namespace, part: ModelPart) -> int:
    """Serve a job that trains."""
    folder, _ = find_job(options.follow)
    if folder is None:
        raise InvalidArgument(
            f"--follow {options.follow}: give the job's name or folder, where its checkpoints are found, too"
        )
    spec = read_spec(folder)
    security = security_of(options, stored_security(folder))
    check_address(options.listen)
    security.check_listen(options.listen, "--listen")
    store = place_of(spec).open(folder)
    transport = BlockingTransport(security=security)
    try:
        recall = _recall(options)
        check_recall(recall, {table.name: table.dim for table in spec.tables})
        predictor = _predictor(
            options, part, lambda threads: predictor_of_job(spec, recipe=options.recipe, scorers=threads)
        )
        job = (store, transport.call, lambda: read_address(folder), spec.job)
        how = {"trust": options.trust, "dense": predictor is not None}
        following = (
            FrontingJob(*job, RowServers(options.rows_at, security=security), **how)
            if options.rows_at
            else Following(*job, recall=recall, part=part, **how)
        )
        return _serve(options, store, security, part, serving=following, predicts=lambda model: predictor)
    finally:
        transport.close()


def _serve(
    options: argparse.Namespace,
    store: Reading,
    security: Security,
    part: ModelPart,
    *,
    predicts: Callable[[Model], Predictor | None],
    cut: int | None = None,
    serving: Serving | None = None,
) -> int:
    recall = _recall(options)
    to_stream(options.log_level)
    if not are_compiled():
        print("compiling kernels for this machine, once; this takes some seconds", file=sys.stderr, flush=True)
    begun = time.monotonic()
    settings = Settings(
        listen=options.listen,
        http=options.http,
        cut=cut,
        follow_cuts=options.follow_cuts or (bool(options.rows_at) and not options.follow),
        trust=options.trust,
        drain_seconds=options.drain_seconds,
        max_keys=options.max_keys,
        metrics_port=options.metrics_port,
        metrics_host=options.metrics_host,
        threads=options.threads,
        request_memory_bytes=options.request_memory_bytes,
        recall=recall,
        part=part,
    )
    where: dict[str, str | None] = {"prediction": None}

    def noted(model: Model) -> Predictor | None:
        found = predicts(model)
        where["prediction"] = None if found is None else found.name
        return found

    def listening(address: str, metrics: str, http: str) -> None:
        where.update(address=address, metrics=metrics, http=http)
        if not options.json:
            scheme = "https" if security.serves_tls else "http"
            page = f", metrics at {scheme}://{metrics}/metrics" if metrics else ""
            page += f", HTTP at {scheme}://{http}/v2" if http else ""
            print(f"listening at {address}{page}", flush=True)

    def ready(serving: Serving) -> None:
        snapshot, seconds = serving.current, time.monotonic() - begun
        facts: dict[str, object] = {
            **where,
            "run": snapshot.version.run,
            "cut": snapshot.version.cut,
            "rows": snapshot.rows,
        }
        facts |= {"part": part.number, "parts": part.parts} if not part.whole else {}
        facts |= {"bytes": snapshot.nbytes, "seconds": round(seconds, 3)}
        text = (
            f"ready: cut {snapshot.version.cut} of run {snapshot.version.run}, {len(snapshot.tables)} tables, "
            f"{snapshot.rows:,} rows, {snapshot.nbytes / 1e6:,.0f} MB, after {seconds:.1f} s"
            + ("" if part.whole else f"; {part}")
            + (f"; predictions of {where['prediction']}" if where["prediction"] else "")
        )
        print(json.dumps(facts) if options.json else text, flush=True)

    with _progress() as progress:
        run(
            store,
            settings,
            security=security,
            predicts=noted,
            listening=listening,
            progress=progress,
            ready=ready,
            serving=serving,
        )
    return 0


def _recall(options: argparse.Namespace) -> tuple[RecallSpec, ...]:
    """Return which tables are asked for their nearest rows."""
    found = tuple(read_recall(text) for text in options.recall)
    if any(spec.ann for spec in found):
        load_faiss()
    return found


def _checkpoints_of(path: str) -> tuple[str, Path | None]:
    """Return where the checkpoints are, with the cut that is named, and the folder of their job, if it is that which is named."""
    for folder, cut in ((path, None), split_cut(path)) if "://" not in path else ():
        if (Path(folder) / CHECKPOINTS).is_dir():
            return f"{Path(folder) / CHECKPOINTS}{'' if cut is None else f'@{cut}'}", Path(folder)
    return path, None


@contextmanager
def _progress() -> Iterator[Told]:
    """Yield what is told how many bytes of the model are open, and shows it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        told = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told >= SAY_SECONDS and done < total:
                told = time.monotonic()
                print(f"opening: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)

        yield say
        return
    columns = TextColumn("opening the model"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    shown = Progress(*columns, console=console, transient=True)
    task = shown.add_task("", total=None)

    def show(done: int, total: int) -> None:
        if not shown.live.is_started and done < total:
            shown.start()
        shown.update(task, completed=done, total=total)
        if done >= total:
            shown.stop()

    try:
        yield show
    finally:
        shown.stop()


def _facts(found: ModelReply) -> dict[str, object]:
    """Return what a server says, ready for JSON."""
    version = found.version
    return {
        "job": found.job,
        "run": version.run,
        "cut": version.cut,
        "seconds_since": round(version.seconds_since, 3),
        "pinned": found.pinned,
        "cuts": list(found.cuts),
        "problem": found.problem,
        "part": found.part,
        "parts": max(1, found.parts),
        "tables": [
            {"name": t.name, "dim": t.dim, "rows": t.rows, "dtype": t.dtype, "bytes": t.bytes, "absent": t.absent}
            for t in found.tables
        ],
    }


def _text(found: ModelReply, *, together: bool) -> str:
    """Return what a server says in words; ``together``: what several say that have all parts."""
    version = found.version
    of = f", all {found.parts} parts" if together else f", part {found.part} of {found.parts}"
    lines = [
        f"cut {version.cut} of run {version.run}, {version.seconds_since:,.0f} s old"
        + (of if found.parts > 1 else "")
        + (", pinned: newer ones are not taken" if found.pinned else "")
    ]
    lines += [
        f"  {t.name}: {t.rows:,} rows of {t.dim} {t.dtype}, {t.bytes / 1e6:,.1f} MB; a key without a row reads as "
        + ("zeros" if t.absent == "zeros" else "its first value")
        for t in found.tables
    ]
    if found.problem:
        lines.append(f"  problem: {found.problem}")
    return "\n".join(lines)
