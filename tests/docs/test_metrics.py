# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md is what the table of metrics says, its expressions name metrics that exist, and names are Prometheus's kind."""

import re
from pathlib import Path

import pytest

from oarlock.telemetry.document import MARKER, rewritten
from oarlock.telemetry.metrics import METRICS, Metric
from oarlock.telemetry.prometheus import MAX_CONNECTIONS, SECONDS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
KINDS = {m.name: m.kind for m in METRICS}
UNITS = ("_seconds", "_bytes")
# Units that are none: what Prometheus wants instead.
WRONG = re.compile(r"_(ms|millis\w*|us|micro\w*|minutes|hours|kb|mb|gb|kib|mib|percent)(_|$)")


def test_the_reference_is_the_table() -> None:
    assert rewritten(TEXT) == TEXT, "run `python -m oarlock.telemetry docs/metrics.md`"
    for metric in METRICS:
        assert TEXT.count(f"| `{metric.name}` | {metric.kind} |") == 1
    with pytest.raises(ValueError, match="no line"):
        rewritten("# Metrics\n")


def test_what_it_says_by_hand_names_metrics_that_exist() -> None:
    above = TEXT.partition(MARKER)[0]
    named = set(re.findall(r"oarlock_[a-z_]+", above))
    assert len(named) >= 10
    for name in named:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in KINDS or KINDS.get(base) == "histogram", name
    assert f"has {SECONDS:g} s; there are {MAX_CONNECTIONS} at once" in " ".join(above.split())


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_names_follow_prometheus(metric: Metric) -> None:
    name = metric.name
    assert re.fullmatch(r"(oarlock|process)_[a-z]+(_[a-z]+)*", name)
    assert name.endswith("_total") == (metric.kind == "counter")
    assert not WRONG.search(name)
    # Where there is a unit it comes last, but for what makes it a counter.
    for unit in UNITS:
        assert unit not in name or name.removesuffix("_total").endswith(unit), name
    assert not name.endswith(("_bucket", "_sum", "_count"))
    for label in metric.labels:
        assert re.fullmatch(r"[a-z]+", label)
        # Prometheus has these for itself.
        assert label not in ("le", "quantile", "job", "instance")
    assert len(set(metric.labels)) == len(metric.labels)
    assert metric.help.endswith(".")
    assert "\n" not in metric.help
    assert "|" not in metric.help


def test_every_metric_is_named_once() -> None:
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
