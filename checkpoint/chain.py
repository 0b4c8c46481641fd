# SPDX-License-Identifier: Apache-2.0
"""A block's chain of files: when to begin a new one, how one is merged, and what may stand in place of its beginning.

Invariant: a merged chain is the block at the newest link's instant: per link, first the keys that left it go, then its rows
and waiting keys count, whatever older links say. Pure functions over arrays and entries; nothing loops over keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage, take_rows
from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.format import compact_folder
from oarlock.proto.errors import InvalidArgument

# From here on a chain is compacted, beside training: reading eight links takes about four times a whole file's CPU time.
MAX_LINKS = 8
# However far compaction has fallen behind, a chain gets no longer, nor its increments more rows than so many whole files.
HARD_LINKS, HARD_ROWS = 32, 4


@dataclass(frozen=True, eq=False)
class Increment:
    """What one link says. ``gone: uint64[g]``, ascending: keys that left since the link before."""

    image: BlockImage
    gone: NDArray[np.uint64]


def should_be_whole(entry: BlockEntry | None, changed_rows: int, rows: int) -> bool:
    """Tell whether the next cut should have the block whole, after ``entry``: ``changed_rows`` of its ``rows`` changed since.

    It should if an increment would save next to nothing, or if compaction is so far behind that reading the chain would cost
    many times its block. Else chains are compaction's (``should_be_compacted``): a cut has to be quick.
    """
    if entry is None or entry.kind != "rows" or 8 * changed_rows > 7 * rows:
        return True
    return len(entry.base) >= HARD_LINKS - 1 or _rows_after(entry) + changed_rows > HARD_ROWS * max(
        rows, _rows_of(entry)
    )


def should_be_compacted(entry: BlockEntry, links: int = MAX_LINKS) -> bool:
    """Tell whether a chain is to be made one whole file: it has ``links``, or more rows after its whole file than in it."""
    return len(entry.base) >= max(1, links - 1) or (bool(entry.base) and _rows_after(entry) > _rows_of(entry))


def _rows_of(entry: BlockEntry) -> int:
    return entry.links[0].rows


def _rows_after(entry: BlockEntry) -> int:
    return sum(link.rows for link in entry.links[1:])


def rebase(entry: BlockEntry, compacted: BlockEntry) -> BlockEntry:
    """Return ``entry`` with ``compacted`` in place of the links that it stands for; ``entry`` itself if it has none of them."""
    whole = compacted.links[-1]
    links = entry.links
    for at, link in enumerate(links):
        if whole.folder == compact_folder(link.number) and whole.file == link.file and link.folder != whole.folder:
            if whole.seq != link.seq:
                raise InvalidArgument(f"{entry.where}: {whole.folder} is of another history of the job")
            return compacted if at == len(links) - 1 else replace(entry, base=(whole, *links[at + 1 : -1]))
    return entry


def merge(links: Sequence[Increment]) -> BlockImage:
    """Return the block that a chain holds. The first link is whole; InvalidArgument if two links cannot be of one block."""
    newest = links[-1].image
    for link in links:
        found, wanted = _widths(link.image), _widths(newest)
        if found != wanted:
            raise InvalidArgument(f"rows of {found} weights, state values and counters in a chain of {wanted}")
    live = [np.ones(len(link.image.keys), np.bool_) for link in links]
    waits = [np.ones(len(link.image.waiting), np.bool_) for link in links]
    over = np.empty(0, np.uint64)  # keys of which a newer link speaks
    for at in range(len(links) - 1, -1, -1):
        image = links[at].image
        live[at] = ~among(image.keys, over)
        waits[at] = ~among(image.waiting, over)
        if at:
            over = np.unique(np.concatenate([over, links[at].gone, image.keys, image.waiting]))
    keys = np.concatenate([link.image.keys for link in links])
    rows = np.flatnonzero(np.concatenate(live))
    # A link's rows ascend, so this merges runs more than it sorts.
    rows = rows[np.argsort(keys[rows], kind="stable")]
    columns: list[NDArray[Any]] = []
    for name in ("weights", "state", "counters"):
        # Put together first, since whole rows are then gathered at once, which is worth the copy.
        out = take_rows(np.concatenate([getattr(link.image, name) for link in links]), rows)
        out.flags.writeable = False
        columns.append(out)
    waiting = np.concatenate([link.image.waiting[kept] for link, kept in zip(links, waits, strict=True)])
    waited = np.concatenate([link.image.waited[kept] for link, kept in zip(links, waits, strict=True)])
    by_key = np.argsort(waiting, kind="stable")
    return replace(
        newest,
        keys=keys[rows],
        weights=columns[0],
        state=columns[1],
        counters=columns[2],
        waiting=waiting[by_key],
        waited=waited[by_key],
        sketch=next((link.image.sketch for link in reversed(links) if link.image.sketch), b""),
    )


def _widths(image: BlockImage) -> tuple[int, int, int]:
    return image.weights.shape[1], image.state.shape[1], image.counters.shape[1]


def among(keys: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell for each of ascending ``keys`` whether it is among ascending ``others``, looking up the fewer of the two."""
    if len(keys) == 0 or len(others) == 0:
        return np.zeros(len(keys), np.bool_)
    if len(others) < len(keys):
        at = np.searchsorted(keys, others)
        found = np.zeros(len(keys) + 1, np.bool_)
        hits = at < len(keys)
        found[at[hits][keys[at[hits]] == others[hits]]] = True
        return found[:-1]
    at = np.minimum(np.searchsorted(others, keys), len(others) - 1)
    same: NDArray[np.bool_] = others[at] == keys
    return same
