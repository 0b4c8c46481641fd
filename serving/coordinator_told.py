# SPDX-License-Identifier: Apache-2.0
"""What a coordinator tells whoever follows its job: the newest cut, the line of cuts that the job is on, and where blocks are.

Invariant: what is no status is no cut; what shards told of where blocks went is not forgotten for it. Any thread.
"""

import logging
from typing import Any

from oarlock.checkpoint.line import line_of, restores_in
from oarlock.checkpoint.reading import Reading
from oarlock.client.router import Routes, unpack_changes

logger = logging.getLogger(__name__)


def line_in(store: Reading, status: dict[str, Any]) -> list[int]:
    """Return the cuts of ``store`` that are of the job's line of history, as a status tells it; none if they cannot be read."""
    try:
        return line_of(store.cuts(), restores_in(status.get("events")))
    except OSError as error:
        logger.warning("event=cuts_not_read error=%s", error)
        return []


def newer_routes(before: Routes, placement: Any, routes: Routes) -> Routes:
    """Return what is known of the placement: a shard may have told of what the coordinator is about to tell."""
    changes = unpack_changes(before.layout, placement)
    return before.after(changes) if len(before.owners) == len(routes.owners) else routes


def newest_cut(status: dict[str, Any]) -> int:
    """Return the number of the newest cut that a status names, 0 if there is none."""
    found = status.get("checkpoints")
    cuts = [known.get("cut") for known in found if isinstance(known, dict)] if isinstance(found, list) else []
    return ([0] + [cut for cut in cuts if isinstance(cut, int)])[-1]
