# SPDX-License-Identifier: Apache-2.0
"""The cases of the quality benchmark: a mode and the forms in which values travel, and what a job of one came to.

Invariant: a case is what is spelt, nothing else differs between the jobs of a comparison but the seed. Pure.
"""

import copy
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from oarlock.client.compression import DENSE, FLOAT32, WireSpec
from oarlock.client.job import MODES
from oarlock.launch.config import assign
from oarlock.proto.errors import InvalidArgument

# One worker in one process; what every case is compared with, if nothing is changed in it.
BASE = "in-process"
# What geo trains with, and what it is compared with beside BASE.
SGD = "recipe_options.optimizer=sgd"
CASES = (
    "async",
    "ssp:2",
    "async:4",
    "geo:4@" + SGD,
    f"{BASE}@" + SGD,
    "async/float16/float16",
    "async/bfloat16/bfloat16",
    "async/int8/int8",
    "async/int8+feedback/int8",
    "async/topk:0.25/bfloat16",
    "async/float32/float32/zstd",
    "async@cache:3",
)
CACHE = "cache:"
# Rows that a worker keeps of each table under ``@cache:BOUND``: all of those that are generated, most of any small data set.
CACHE_ROWS = 100_000
HOW = (
    "write MODE[:N][/PUSH[/PULL[/zstd]]][@cache:BOUND][@NAME=VALUE]..., as in 'async/int8+feedback/int8' or 'geo:4@"
    + SGD
    + "', "
    f"with a mode of {', '.join((BASE, *MODES))}"
)


@dataclass(frozen=True)
class Case:
    """``MODE[:N][/PUSH[/PULL[/zstd]]][@CHANGE]...``.

    N is the staleness of ssp, the group of geo, and batches of a group elsewhere. A change is ``cache:BOUND``, of all tables,
    or a field of the run as ``--set`` of `oarlock train` takes it. The mode ``in-process``: one worker and one shard in one
    process.
    """

    text: str
    mode: str
    number: int
    wire: WireSpec
    changes: tuple[str, ...] = ()

    @property
    def in_process(self) -> bool:
        return self.mode == BASE

    @property
    def own_base(self) -> str:
        """Return the case of one worker in one process that has the same changes, but those of how rows travel."""
        return "@".join((BASE, *(change for change in self.changes if not change.startswith(CACHE))))

    def settings(self, tables: Iterable[str], common: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the fields of a run, ``common`` and the case's own; every table and the dense parameters travel alike."""
        tables = list(tables)
        out = copy.deepcopy(dict(common or {}))
        out |= {"servers": 1, "workers": 1} if self.in_process else {"mode": self.mode}
        if self.number:
            out["staleness" if self.mode == "ssp" else "accumulate"] = self.number
        if self.wire != WireSpec():
            form = {"pull": self.wire.pull, "push": self.wire.push, "zstd": self.wire.zstd}
            out["compression"] = dict.fromkeys((*tables, DENSE), form)
        for change in self.changes:
            if change.startswith(CACHE):
                out["cache"] = {
                    table: {"rows": CACHE_ROWS, "bound": int(change.removeprefix(CACHE))} for table in tables
                }
            else:
                assign(out, change)
        return out


def read_case(text: str) -> Case:
    """Return a case; InvalidArgument says how one is written."""
    first, *changes = text.split("@")
    mode, *forms = first.split("/")
    mode, _, number = mode.partition(":")
    packed = forms[2:] == ["zstd"]
    if packed:
        forms.pop()
    wrong = mode not in (BASE, *MODES) or len(forms) > 2 or not (number.isdecimal() or not number)
    for change in changes:
        wrong |= "=" not in change and not (change.startswith(CACHE) and change.removeprefix(CACHE).isdecimal())
    if wrong:
        raise InvalidArgument(f"case {text!r}: {HOW}")
    push, pull = (*forms, FLOAT32, FLOAT32)[:2]
    return Case(text, mode, int(number or 0), WireSpec(pull, push, packed), tuple(changes))


class Trained(NamedTuple):
    """What one job came to. ``bytes_per_sample``: of rows and gradients, as they travelled, if it was told in time."""

    metric: float
    samples_per_s: float
    bytes_per_sample: float | None = None


@dataclass
class Outcome:
    """What the jobs of one case came to, one entry a seed."""

    jobs: list[Trained] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.fmean(job.metric for job in self.jobs)

    def told(self, base: "Outcome | None", own: "Outcome | None" = None) -> dict[str, Any]:
        """Return the figures; ``spread`` is the lowest and the highest seed.

        ``gap`` is the mean's distance to that of ``base``, ``gap_own`` to that of ``own``, the one with the same changes;
        ``gap_error`` is the standard error of ``gap`` by the differences seed by seed: a gap below twice of it tells nothing.
        """
        metrics = [job.metric for job in self.jobs]
        out: dict[str, Any] = {
            "mean": round(self.mean, 6),
            "spread": [round(min(metrics), 6), round(max(metrics), 6)],
            "deviation": round(statistics.stdev(metrics), 6) if len(metrics) > 1 else None,
            "seeds": [round(value, 6) for value in metrics],
            "samples_per_s": round(statistics.median(job.samples_per_s for job in self.jobs), 1),
        }
        moved = [job.bytes_per_sample for job in self.jobs if job.bytes_per_sample is not None]
        if moved:
            out["bytes_per_sample"] = round(statistics.median(moved), 1)
        if base is not None:
            out["gap"] = round(self.mean - base.mean, 6)
            differences = [job.metric - other.metric for job, other in zip(self.jobs, base.jobs, strict=False)]
            if len(differences) > 1:
                out["gap_error"] = round(statistics.stdev(differences) / len(differences) ** 0.5, 6)
        if own is not None:
            out["gap_own"] = round(self.mean - own.mean, 6)
        return out


def bytes_per_sample(status: dict[str, Any]) -> float | None:
    """Return the bytes of values a sample, out of what members last told; None before there are any, or once it is evaluated.

    Evaluation pulls whole rows, so only what comes before the first one is counted. Members tell at times of their own, so a
    figure is off by what is trained between two heartbeats.
    """
    if status.get("epoch", 1) or status.get("evaluated", 1):
        return None
    moved = samples = 0
    for member in status["members"]:
        stats = member["stats"] or {}
        moved += stats.get("pull_bytes", 0) + stats.get("push_bytes", 0)
        samples += stats.get("samples", 0)
    return moved / samples if samples else None
