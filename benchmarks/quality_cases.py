# SPDX-License-Identifier: Apache-2.0
"""The cases of the quality benchmark: a mode and the forms in which values travel, and what a job of one came to.

Invariant: a case is what is spelt, nothing else differs between the jobs of a comparison but the seed. Pure.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from oarlock.client.compression import DENSE, FLOAT32, WireSpec
from oarlock.client.job import MODES
from oarlock.proto.errors import InvalidArgument

BASE = "in-process"
CASES = (
    "async",
    "async/float16/float16",
    "async/bfloat16/bfloat16",
    "async/int8/int8",
    "async/int8+feedback/int8",
    "async/topk:0.25/bfloat16",
    "async/float32/float32/zstd",
)


@dataclass(frozen=True)
class Case:
    """``MODE[:N][/PUSH[/PULL[/zstd]]]``: N is the staleness of ssp, the group of geo, and batches of a group elsewhere."""

    text: str
    mode: str
    number: int
    wire: WireSpec

    def settings(self, tables: Iterable[str]) -> dict[str, Any]:
        """Return the fields of a run; every table and the dense parameters travel alike."""
        out: dict[str, Any] = {"mode": self.mode}
        if self.number:
            out["staleness" if self.mode == "ssp" else "accumulate"] = self.number
        if self.wire != WireSpec():
            form = {"pull": self.wire.pull, "push": self.wire.push, "zstd": self.wire.zstd}
            out["compression"] = dict.fromkeys((*tables, DENSE), form)
        return out


def read_case(text: str) -> Case:
    """Return a case; InvalidArgument says how one is written."""
    mode, *forms = text.split("/")
    mode, _, number = mode.partition(":")
    packed = forms[2:] == ["zstd"]
    if packed:
        forms.pop()
    if mode not in MODES or len(forms) > 2 or not (number.isdecimal() or not number):
        raise InvalidArgument(
            f"case {text!r}: write MODE[:N][/PUSH[/PULL[/zstd]]] with a mode of {', '.join(MODES)}, as in {CASES[4]!r}"
        )
    push, pull = (*forms, FLOAT32, FLOAT32)[:2]
    return Case(text, mode, int(number or 0), WireSpec(pull, push, packed))


@dataclass
class Outcome:
    """What the jobs of one case came to, one entry a seed. ``bytes_per_sample``: of rows and gradients, as they travelled."""

    metrics: list[float] = field(default_factory=list)
    samples_per_s: list[float] = field(default_factory=list)
    bytes_per_sample: list[float] = field(default_factory=list)

    def told(self, base: "Outcome | None") -> dict[str, Any]:
        """Return the figures; ``gap`` is the mean's distance to that of ``base``, ``spread`` lowest and highest seed."""
        mean = statistics.fmean(self.metrics)
        out: dict[str, Any] = {
            "mean": round(mean, 6),
            "spread": [round(min(self.metrics), 6), round(max(self.metrics), 6)],
            "deviation": round(statistics.stdev(self.metrics), 6) if len(self.metrics) > 1 else None,
            "seeds": [round(value, 6) for value in self.metrics],
            "samples_per_s": round(statistics.median(self.samples_per_s), 1),
        }
        if self.bytes_per_sample:
            out["bytes_per_sample"] = round(statistics.median(self.bytes_per_sample), 1)
        if base is not None:
            out["gap"] = round(mean - statistics.fmean(base.metrics), 6)
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
