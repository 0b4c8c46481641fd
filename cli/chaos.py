# SPDX-License-Identifier: Apache-2.0
"""`oarlock chaos`: train a job while its processes die, and print the ledger.

Invariant: what it says was lost is said by what did not come from the mechanism under test: groups by the job's files, and the
workers' notes of what was acknowledged; the job's folder is temporary unless --dir names one.
"""

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from oarlock.cli.chaos_options import DEMO_EPOCHS
from oarlock.cli.show import metric, result_console
from oarlock.client.job import DONE, JobSpec
from oarlock.data.planted import generate_ncf
from oarlock.launch.chaos_events import USUAL, Plan, survivable
from oarlock.launch.chaos_ledger import groups_of, summary
from oarlock.launch.chaos_run import Ended, run_job
from oarlock.launch.config import RunConfig, assign, load_toml, run_config
from oarlock.launch.folder import create
from oarlock.launch.kernels import make_ready
from oarlock.launch.processors import processors_of
from oarlock.proto.errors import InvalidArgument, Unavailable
from oarlock.proto.security import Security

# More shards and workers than a job begins with may be asked for.
MORE_SHARDS, MORE_WORKERS = 2, 1


def chaos(options: argparse.Namespace) -> int:
    """Run the job, then quiet ones; print what it came to."""
    # What the launcher warns of is in the ledger.
    logging.getLogger("oarlock").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory(prefix="oarlock-chaos-") as temporary:
        run = _run_of(options, Path(temporary))
        folder = Path(options.dir).absolute() if options.dir else Path(temporary) / "job"
        spec = create(folder, folder.name, run)
        make_ready(_say)
        plan = plan_of(options, run, spec)
        _say(f"job {spec.name}: {plan.events} events, one every {plan.gap_seconds:g} s: {_kinds(plan)}")
        ended = _train(spec, folder, run, plan)
        quiet = []
        for number in range(options.quiet_runs):
            peace, where = replace(run, seed=run.seed + number), Path(temporary) / f"quiet-{number}"
            _say(f"quiet run {number + 1} of {options.quiet_runs}, seed {peace.seed}")
            quiet.append(_train(create(where, where.name, peace), where, peace, None))
        result = told(ended, quiet, plan)
    print(json.dumps(result)) if options.json else _show(result)
    sys.stdout.flush()
    if ended.status["phase"] != DONE:
        raise Unavailable(f"job {spec.name} ended as {ended.status['phase']}: {ended.status['reason']}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run_of(options: argparse.Namespace, temporary: Path) -> RunConfig:
    values: dict[str, Any] = {}
    if options.demo:
        generate_ncf(temporary / "data", seed=0)
        values = {
            "recipe": "ncf",
            "data": str(temporary / "data"),
            "epochs": DEMO_EPOCHS,
            "replicas": 1,
            "lease_seconds": 2.0,
            "heartbeat_seconds": 0.2,
        }
    else:
        values = load_toml(Path(options.job))
    for setting in options.set:
        assign(values, setting)
    if options.data is not None:
        values["data"] = options.data
    if not values.get("data"):
        raise InvalidArgument("no data: give --data DIR, or `data` in the job file")
    run = run_config(values)
    if run.checkpoint_path and options.quiet_runs:
        raise InvalidArgument(
            f"checkpoint_path = {run.checkpoint_path!r} and --quiet-runs contradict each other: several jobs would write there; "
            "leave one of them out"
        )
    return run


def plan_of(options: argparse.Namespace, run: RunConfig, spec: JobSpec) -> Plan:
    """Return what is done to a job: what it outlives, with no fewer shards and workers than it began with."""
    return Plan(
        options.events,
        options.gap,
        options.seed,
        survivable(USUAL, spec),
        (run.servers, run.servers + MORE_SHARDS),
        (run.workers, run.workers + MORE_WORKERS),
    )


def _kinds(plan: Plan) -> str:
    left_out = [kind for kind in USUAL if kind not in plan.mix]
    text = ", ".join(plan.mix)
    return (
        f"{text}; not {', '.join(left_out)}: without copies (replicas) the job would go back to its last cut"
        if left_out
        else text
    )


def _train(spec: JobSpec, folder: Path, run: RunConfig, plan: Plan | None) -> Ended:
    security = Security(run.security_spec(), own=True).open()
    return run_job(spec, folder, plan, restarts=run.restarts, processors=processors_of(run), security=security)


def told(ended: Ended, quiet: list[Ended], plan: Plan) -> dict[str, Any]:
    """Return all that is known of a run. ``groups_unacknowledged``: None unless the job came to its end."""
    spec, status = ended.spec, ended.status
    over = status["phase"] == DONE
    groups = groups_of(spec)
    result: dict[str, Any] = {
        "name": spec.name,
        "phase": status["phase"],
        "reason": status["reason"],
        "seconds": round(ended.seconds, 1),
        "seed": plan.seed,
        "asked": plan.events,
        **summary([ended.ledger]),
        "groups": groups,
        "groups_unacknowledged": groups - ended.ledger.acknowledged if over else None,
        "samples": [r["samples"] for r in status["history"]],
        "recoveries": status.get("recoveries", []),
        "warnings": status.get("warnings", []),
        "ledger": [entry.to_json() for entry in ended.ledger.entries],
    }
    name = spec.metrics[0] if spec.metrics else ""
    values = [_metric(each, name) for each in (ended, *quiet)]
    result |= {"metric": name, "value": values[0]}
    known = [value for value in values[1:] if value is not None]
    if quiet:
        result |= {"quiet": values[1:], "quiet_seeds": [each.spec.seed for each in quiet]}
    if known and values[0] is not None:
        result["gap"] = round(abs(values[0] - sum(known) / len(known)), 6)
        result["quiet_range"] = round(max(known) - min(known), 6)
    return result


def _metric(ended: Ended, name: str) -> float | None:
    history = ended.status["history"]
    return history[-1]["metrics"].get(name) if history else None


def _show(result: dict[str, Any]) -> None:
    console = result_console()
    table = Table(title=f"{result['name']}: {result['phase']}", title_justify="left")
    for name in ("at s", "event", "of", "waited s", "went on after s", "parts", "followed"):
        table.add_column(name, justify="left" if name in ("event", "followed") else "right")
    for e in result["ledger"]:
        recovered = e.get("recover_s")
        silent = f", {e['silent']} without a push since" if e.get("silent") else ""
        table.add_row(
            f"{e['at']:.1f}",
            e["event"],
            str(e.get("target", "")),
            f"{e['waited']:.1f}",
            "" if recovered is None else f"{recovered:.2f}",
            str(e.get("parts", "")),
            f"not done: {e['passed']}" if e.get("passed") else e.get("followed", "") + silent,
        )
    console.print(table)
    for line in lines_of(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def lines_of(result: dict[str, Any]) -> list[str]:
    """Return what is said below the table."""

    def seconds(name: str) -> str:
        return "-" if result[name] is None else f"{result[name]:.2f} s"

    times = (
        f"killed shards: trained again after {seconds('recover_s_p50')} in the median, {seconds('recover_s_max')} at the worst; "
        f"stopped ones: {seconds('paused_recover_s_max')}; killed workers: {seconds('worker_recover_s_max')}; "
        f"the coordinator answered after {seconds('coordinator_recover_s_max')}"
    )
    lines = [f"{result['events']} of {result['asked']} events in {result['seconds']:.0f} s", times]
    if result["groups_unacknowledged"] is not None:
        missing = result["groups_unacknowledged"]
        lines.append(f"of {result['groups']} groups {missing or 'none'} had no push acknowledged")
    if result["value"] is not None:
        text = f"{result['metric']} {metric(result['value'])} in the last epoch"
        if "gap" in result:
            text += (
                f"; of quiet runs {', '.join(metric(v) for v in result['quiet'])}: {result['gap']:.4f} from their mean"
            )
        lines.append(text)
    return lines
