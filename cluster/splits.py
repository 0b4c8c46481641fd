# SPDX-License-Identifier: Apache-2.0
"""Splits: what workers say of those that they have, counted once and on disk before they are answered.

    closed       all its groups are acknowledged
    evaluated    what it found is kept; the last one of an epoch ends it
    released     somebody else gets it; too many errors on one end the job

Invariant: what is said again changes nothing. Any thread; the coordinator's lock is taken.
"""

from typing import TYPE_CHECKING

from oarlock.client.compression import feedback_of
from oarlock.cluster.epoch_end import end_epoch_if_done
from oarlock.cluster.evaluation import MAX_SUM, Found
from oarlock.cluster.work import MAX_FAILURES
from oarlock.proto.errors import InvalidArgument

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator

# More samples than this in one split are no count but a mistake.
MAX_SAMPLES = 1 << 53


def close_split(c: "Coordinator", worker: int, split: int, samples: int, loss_sum: float, groups: int = 0) -> None:
    """Count a split as trained."""
    if not abs(loss_sum) <= MAX_SUM:
        raise InvalidArgument(
            f"split {split}: the loss is {loss_sum}; the model diverged, lower its learning rates", split=split
        )
    if max(samples, groups) > MAX_SAMPLES:
        raise InvalidArgument(f"split {split}: {samples} samples in {groups} groups are no count", split=split)
    with c.lock:
        # A report that is repeated is answered from memory, which a write that failed leaves ahead of the disk.
        c.store.check()
        # The time until now was training, also if this split is the epoch's last.
        c.count_time()
        if c.work.close(worker, split, samples, loss_sum, groups):
            with c.store as store:
                c.record_work(store)


def evaluated(c: "Coordinator", worker: int, split: int, found: Found) -> None:
    """Keep what an evaluation split found, as ``evaluation.check`` let it pass; the last one of an epoch ends it."""
    with c.lock:
        c.store.check()
        if not c.work.evaluate(worker, split, found):
            return
        with c.store as store:
            store.set_evaluation(split, found)
    end_epoch_if_done(c)


def release(c: "Coordinator", worker: int, kind: str, split: int, reason: str) -> None:
    with c.lock:
        if not c.work.release(worker, kind, split, reason):
            c.fail(f"{kind} split {split} met an error on {MAX_FAILURES} workers: {reason}")
        if kind == "train" and feedback_of(c.spec.compression):
            with c.store as store:
                store.set_fact("counted", c.counted())
