# SPDX-License-Identifier: Apache-2.0
"""The text exposition format of Prometheus, version 0.0.4: metrics as lines that a scraper reads.

Invariant: a pure function; whatever a label's value holds, a sample is one line and its labels end where they should.
"""

import math
from collections.abc import Iterable, Iterator

from oarlock.telemetry.histogram import Histogram
from oarlock.telemetry.registry import Family, Labels

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(families: Iterable[Family]) -> str:
    """Return the page: HELP and TYPE of each metric, then its samples."""
    lines: list[str] = []
    for family in families:
        name = family.metric.name
        lines.append(f"# HELP {name} {_escaped(family.metric.help)}")
        lines.append(f"# TYPE {name} {family.metric.kind}")
        for labels, value in family.samples.items():
            if isinstance(value, Histogram):
                lines.extend(_histogram(name, labels, value))
            else:
                lines.append(f"{name}{_braced(labels)} {number(value)}")
    return "\n".join(lines) + "\n" if lines else ""


def _histogram(name: str, labels: Labels, found: Histogram) -> Iterator[str]:
    counts, total = list(found.counts), found.sum
    below = 0
    for bound, count in zip((*found.bounds, math.inf), counts, strict=True):
        below += count
        yield f"{name}_bucket{_braced((*labels, ('le', number(bound))))} {below}"
    yield f"{name}_sum{_braced(labels)} {number(total)}"
    yield f"{name}_count{_braced(labels)} {below}"


def number(value: float) -> str:
    """Return a number as the format wants it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return repr(value)


def _braced(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(text, quotes=True)}"' for name, text in labels) + "}"


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text
