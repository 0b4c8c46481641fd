# SPDX-License-Identifier: Apache-2.0
"""The end of an epoch: what its evaluation splits found is merged, the result recorded, and a checkpoint begun if one is due.

Invariant: one thread merges at a time, and not under the coordinator's lock: it may take longer than a lease, and members are
answered meanwhile. Nothing is added to what is merged; the epoch ends only if the job still goes on then. Any thread.
"""

import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING

from oarlock.client.job import OVER, WRITING
from oarlock.cluster.evaluation import Evaluation, merge
from oarlock.cluster.store import Store

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator

logger = logging.getLogger(__name__)


def end_epoch_if_done(c: "Coordinator") -> None:
    """Finish the epoch when it is trained and evaluated; call it without the lock. Others find ``c.merging`` meanwhile."""
    with c.lock:
        work = c.work
        if c.merging or c.phase in OVER or work.finished or not (work.trained and work.evaluated):
            return
        found, c.merging = work.found(), True
    try:
        merged = merge(found, work.metrics)
        with c.lock:
            if c.phase not in OVER:
                with c.store as store:
                    _end(c, store, merged)
    finally:
        c.merging = False


def _end(c: "Coordinator", store: Store, merged: Evaluation) -> None:
    work = c.work
    c.count_time()
    result = work.finish_epoch(merged)
    store.set_epoch(result.epoch, asdict(result))
    store.clear_evaluations()
    c.record_work(store)
    without = ", ".join(name for name, value in result.metrics.items() if value is None)
    if without and work.evaluation_splits:
        what = f"the {result.evaluated} evaluated samples lack a class of labels that it takes"
        c.warn(f"epoch {result.epoch + 1} has no {without}: {what}")
    every = c.spec.checkpoint_epochs
    due = work.finished or (every > 0 and work.epoch % every == 0)
    if due:
        c.phase = WRITING
        store.set_fact("phase", WRITING)
    logger.info("event=epoch_done epoch=%d loss=%.6f metrics=%s", result.epoch, result.loss, json.dumps(result.metrics))
