# SPDX-License-Identifier: Apache-2.0
"""Which stamps mean what: the begins of a table's views are numbered (phases), and seven stamps go round.

    phase p    from the p-th begin of a view on to the next; phase 0 comes before the first
    stamp      0 in phase 0, then 1, 2, ..., 7, 1, 2, ...

A view that began phase p holds what changed in phases before p; what changed in phases c to p - 1 is what came to it since
the view that began phase c. Invariant: no word of a block has a stamp of a phase before the block's ``floor``, and that lies
at most six phases back, so that a stamp other than 0 says one phase. Pure, but for ``Track``, which the block's mutex guards.
"""

from dataclasses import dataclass

ROUND = 7
EVERY = (1 << (ROUND + 1)) - 1  # the bits of all stamps


@dataclass(slots=True)
class Track:
    """What is known of a block's changes. ``known``: the phase that its last committed view began, 0: none; ``version``: the
    block's at that time. ``floor``: words with stamps of earlier phases have 0."""

    known: int = 0
    version: int = 0
    floor: int = 0


def stamp_of(phase: int) -> int:
    """Return the stamp of what changes in a phase."""
    return 1 + (phase - 1) % ROUND if phase else 0


def bits_of(first: int, last: int) -> int:
    """Return the bits of the stamps of phases first to last - 1, of which there may be seven at most."""
    return sum(1 << stamp_of(phase) for phase in range(max(first, 1), last))


def wears_out(track: Track, phase: int) -> int:
    """Return which stamps (their bits) must go from a block's words before a phase begins, mostly none; ``track`` says so then.

    If the block's last committed view is too far back, what changed since is not known any more.
    """
    if phase - track.floor < ROUND:
        return 0
    if phase - track.known >= ROUND:
        track.known = 0
    before = track.floor
    track.floor = track.known or phase
    return bits_of(max(before, phase - ROUND), track.floor)
