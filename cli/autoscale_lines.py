# SPDX-License-Identifier: Apache-2.0
"""What is said of a job's scaler, from its status: between which numbers it may choose, what it saw last, and what it decided.

Invariant: pure; of a job without one nothing is said.
"""

from typing import Any

# So many decisions are shown, the newest; more of them are in `--json`.
MOST = 5


def autoscale_lines(status: dict[str, Any]) -> list[str]:
    """Return the lines on the scaler that ``oarlock status`` has."""
    found = status.get("autoscale")
    if not found:
        return []
    # Of a job that is over there are its decisions.
    now = [_limits(found), *_seen(found)] if "look" in found else []
    return [*now, *map(decision_line, found["decisions"][-MOST:])]


def dry_run_lines(found: dict[str, Any]) -> list[str]:
    """Return what the scaler would do now, and why, of what a status says of it."""
    look = found["look"]
    if look is None:
        return [_limits(found), *_seen(found)]
    would = look["would"].splitlines()
    lines = [
        _limits(found),
        f"measured until {look['created']}: {_figures(look)}",
        f"by this alone: {would[0]}",
        *would[1:],
    ]
    if look["would"] != look["said"]:
        said = look["said"].splitlines()
        lines += [f"decided: {said[0]}", *said[1:]]
    return lines


def decision_line(each: dict[str, Any]) -> str:
    """Return a decision on one line: what changed, why, and when."""
    pairs = zip(("servers", "workers"), each["before"], strict=True)
    changes = ", ".join(f"{was} -> {each[name]} {name}" for name, was in pairs if each[name] != was)
    return f"autoscale{', dry run' if each['dry_run'] else ''}: {changes}: {'; '.join(each['reasons'])} ({each['created']})"


def _limits(found: dict[str, Any]) -> str:
    said = [
        f"{found[name][0]} to {found[name][1]} {name}" if found[name] else f"{name} are left alone"
        for name in ("servers", "workers")
    ]
    return f"autoscale{', dry run' if found['dry_run'] else ''}: {', '.join(said)}"


def _seen(found: dict[str, Any]) -> list[str]:
    look = found["look"]
    if look is None:
        return [
            f"autoscale: {found['measured_seconds']:.0f} of {found['look_seconds']:g} s are measured of the first look"
        ]
    reasons = [line.strip() for line in look["said"].splitlines()[1:]]
    return [f"autoscale saw {_figures(look)}: {'; '.join(reasons) or 'nothing is to change'} ({look['created']})"]


def _figures(look: dict[str, Any]) -> str:
    parts = (
        ("memory", "memory {:.0%}"),
        ("busy", "busy {:.0%}"),
        ("waiting", "{:.1f} pushes waiting"),
        ("samples_per_second", "{:,.0f} samples/s"),
    )
    return ", ".join(form.format(look[name]) for name, form in parts if look[name] is not None) or "nothing"
