# SPDX-License-Identifier: Apache-2.0
"""What servers of a model's parts agree on, by what each says of itself: who belongs to them, and which version all parts have.

Invariant: nothing that a server says is believed before it was checked; an error names the server. Pure, any thread.
"""

import time
from collections.abc import Mapping

from oarlock.proto.errors import InvalidArgument, Malformed, PSError, SpecMismatch, Unavailable, WrongJob
from oarlock.proto.serving_pb2 import ModelReply
from oarlock.serving.fleet import ServedModel, read_model
from oarlock.serving.snapshot import Version

# What a server may say: older, or with more rows, is nothing.
MOST_SECONDS = 1e10
MOST_ROWS = 1 << 48


class SeveralVersions(Unavailable):
    """The parts of a model are of several versions, and none is served of all parts."""


def held_by(replies: Mapping[str, ModelReply]) -> dict[str, tuple[int, str]]:
    """Return by table how many rows all parts have, and in which form; of each part one server counts."""
    found: dict[str, tuple[int, str]] = {}
    for reply in {reply.part: reply for reply in replies.values()}.values():
        for each in reply.tables:
            found[each.name] = (found.get(each.name, (0, ""))[0] + each.rows, each.dtype[:32])
    return found


def check_fits(address: str, reply: ModelReply, wanted: ServedModel) -> int:
    """Return of how many parts a server's model is, which serves what is ``wanted`` (parts 0: any number of them); PSError."""
    try:
        told, _ = read_model(reply)
    except PSError as error:
        raise Malformed(f"{address}: {error.message}") from None
    if told.parts == 1:
        raise InvalidArgument(
            f"{address} has all of its model, not a part: ask it for predictions itself, or start it with --part"
        )
    if told.job != wanted.job:
        raise WrongJob(f"{address} serves rows of job {told.job[:64]}, and not of {wanted.job}")
    if told.tables != wanted.tables:
        raise SpecMismatch(f"{address} serves other tables than this model has: {', '.join(told.tables)[:200]}")
    if wanted.parts not in (0, told.parts):
        raise InvalidArgument(f"{address} serves one of {told.parts} parts, others one of {wanted.parts}")
    if not 0 <= reply.version.seconds_since < MOST_SECONDS:
        raise Malformed(f"{address}: it says that what it serves is {reply.version.seconds_since} s old")
    if any(each.rows > MOST_ROWS for each in reply.tables):
        raise Malformed(f"{address}: it says that it has {max(each.rows for each in reply.tables)} rows of a table")
    return told.parts


def check_form(address: str, reply: ModelReply, kept: dict[str, str]) -> None:
    """Raise SpecMismatch unless a server keeps its rows as the others do, by table, whose forms are ``kept``; notes new ones.

    Scores would be others by another form, whoever answers.
    """
    for each in reply.tables:
        form = kept.setdefault(each.name, each.dtype[:32])
        if form != each.dtype[:32]:
            raise SpecMismatch(f"{address} has the rows of {each.name[:80]} as {each.dtype[:32]}, others as {form}")


def agreed_version(replies: Mapping[str, ModelReply], parts: int) -> Version:
    """Return the newest version that every one of ``parts`` has a server of, by what servers said that fit; Unavailable."""
    by_part: dict[int, set[tuple[int, int, bool]]] = {}
    for reply in replies.values():
        version = reply.version
        by_part.setdefault(reply.part, set()).add((version.run, 0 if version.live else version.cut, version.live))
    if lacking := [part for part in range(parts) if part not in by_part]:
        raise Unavailable(f"no server answers that has part {lacking[0]} of {parts}")
    common = set.intersection(*by_part.values())
    if not common:
        kinds = sorted(set().union(*by_part.values()))
        have = ", ".join(str(Version(run, cut, 0.0, live)) for run, cut, live in kinds)
        raise SeveralVersions(f"no version is served of all parts: their servers have {have}")
    run, cut, live = max(common)
    return Version(run, cut, time.time(), live)
