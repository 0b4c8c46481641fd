# SPDX-License-Identifier: Apache-2.0
"""What is said of a job's copies, from its status: who is wanted and there, which sets lack a member, what moves, what was done
about deaths.

Invariant: pure; a status of an older job says nothing of it, and then nothing is said.
"""

from typing import Any

# So many recoveries are shown, the newest; all of them are in `--json`.
MOST = 20


def copy_lines(status: dict[str, Any]) -> list[str]:
    """Return the lines on numbers, copies, moves and recoveries that ``oarlock status`` has."""
    lines = []
    if "scale" in status:
        lines.append(numbers_line(status))
        if status["replicas"]:
            short = status["incomplete"]
            state = f"{_blocks(short)} {'has' if short == 1 else 'have'} fewer" if short else "all are there"
            lines.append(f"{status['replicas'] + 1} copies of each block: {state}")
        if status["ownerless"]:
            lines.append(f"{_blocks(status['ownerless'])} of shards that died wait for a new owner")
        if moves := moves_line(status):
            lines.append(moves)
    done = status.get("recoveries", [])
    if len(done) > MOST:
        lines.append(f"{len(done) - MOST} earlier recoveries: see --json")
    return lines + [_recovery(each) for each in done[-MOST:]]


def numbers_line(status: dict[str, Any]) -> str:
    """Return how many shards and workers are wanted, and are there."""
    said = []
    for role, name in (("shard", "servers"), ("worker", "workers")):
        wanted, go = status["scale"][name], status["scale"]["leaving"][role]
        there = sum(m["role"] == role for m in status["members"])
        text = f"{name}: {wanted} wanted, {there} there"
        said.append(f"{text}, {', '.join(map(str, sorted(go)))} to leave" if go else text)
    return "; ".join(said)


def moves_line(status: dict[str, Any]) -> str:
    """Return what moves, empty if nothing does."""
    moving = status["moving"]
    left = moving["left"]
    return f"{_blocks(left)} still to move, {moving['closed']} closed for it now" if left else ""


def _recovery(each: dict[str, Any]) -> str:
    pushes = f"{'at least ' if each['more'] else ''}{each['pushes']:,} " if "pushes" in each else ""
    lost = f"; lost: {pushes}{each['lost']}" if each["lost"] else ""
    # Of which shard nobody may know any more.
    whose = f" of shard {each['shard']}" if each["shard"] >= 0 else ""
    what = f"{each['kind']}: {_blocks(each['blocks'])}{whose}"
    if "seconds" not in each:
        return f"{what}, under way{lost}"
    return f"run {each['run']}: {what} in {each['seconds']:.2f} s{lost} ({each['ended']})"


def _blocks(number: int) -> str:
    return f"{number:,} block{'' if number == 1 else 's'}"
