# SPDX-License-Identifier: Apache-2.0
"""The reference part of docs/metrics.md: made of the table of metrics, by a pure function, so that a test can hold it."""

from itertools import groupby

from oarlock.telemetry.metrics import METRICS

# What stands above it in the page is written by hand.
MARKER = "<!-- From here on `python -m oarlock.telemetry docs/metrics.md` writes this page. -->\n"


def reference() -> str:
    """Return the tables of all metrics as Markdown, one for each part of a job."""
    parts = []
    for of, metrics in groupby(METRICS, key=lambda m: m.of):
        rows = [
            f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.help} |" for m in metrics
        ]
        head = f"## {of[0].upper()}{of[1:]}\n"
        parts.append("\n".join([head, "| metric | kind | labels | what it says |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def rewritten(page: str) -> str:
    """Return the page with its reference made anew. ValueError if it has no marker."""
    above, marker, _ = page.partition(MARKER)
    if not marker:
        raise ValueError(f"the page has no line {MARKER.strip()!r}")
    return f"{above}{marker}\n{reference()}"
