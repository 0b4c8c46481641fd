# SPDX-License-Identifier: Apache-2.0
"""Work: the splits of the current epoch, leased to workers, closed or given back; then its evaluation. Pure.

Invariant: a split is leased to at most one living worker and closed at most once; epoch e + 1 begins when all training
splits of e are closed and all its evaluation splits have results. The coordinator's lock covers it.
"""

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from oarlock.client.closed import SPLIT_WINDOW, ClosedSet
from oarlock.cluster.evaluation import Evaluation, Found, Metrics, check_alike, merge
from oarlock.data.scores import merit
from oarlock.proto.errors import LeaseLost, NotFound

# After this many workers met an error on one split the job stops: the split, not the workers, is at fault.
MAX_FAILURES = 3


@dataclass(frozen=True)
class Grant:
    """What a worker may do: ``kind`` train, evaluate, wait or finished; fresh[i]: no shard can have a mark of splits[i]."""

    kind: str
    splits: tuple[int, ...] = ()
    fresh: tuple[bool, ...] = ()


@dataclass
class EpochResult:
    """What became of one epoch: samples trained and the mean loss; evaluation's metrics; seconds of both parts.

    ``evaluated``: samples that the metrics were taken of; 0: only the recipe knows.
    """

    epoch: int
    samples: int
    loss: float
    metrics: Metrics
    train_seconds: float
    evaluate_seconds: float
    evaluated: int = 0


@dataclass
class Work:
    """The state of training and evaluation. ``splits`` and ``evaluation_splits`` are numbers per epoch."""

    splits: int
    evaluation_splits: int
    epochs: int
    metrics: tuple[str, ...]
    closed: ClosedSet = field(default_factory=ClosedSet)
    epoch: int = 0
    results: dict[int, Found] = field(default_factory=dict)
    samples: int = 0
    loss_sum: float = 0.0
    # Groups of all splits that were ever closed.
    steps: int = 0
    history: list[EpochResult] = field(default_factory=list)
    leases: dict[tuple[str, int], int] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    # After a restart or a restore it is not known which splits were ever leased: none counts as fresh.
    all_touched: bool = False
    failures: dict[tuple[str, int], dict[int, str]] = field(default_factory=dict)
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    # Training splits of this line of history that came back unfinished: what error feedback had kept of them is lost. Of a
    # worker that nobody heard again after a restart, as many as it can have had.
    given_back: int = 0

    @property
    def finished(self) -> bool:
        return self.epoch >= self.epochs

    @property
    def trained(self) -> bool:
        """Whether all training splits of the epoch are closed."""
        return self.closed.floor >= (self.epoch + 1) * self.splits

    @property
    def evaluated(self) -> bool:
        return len(self.results) >= self.evaluation_splits

    def open_splits(self) -> list[int]:
        """Return training splits that are leased now, ascending."""
        return sorted(s for kind, s in self.leases if kind == "train")

    def grant(self, worker: int, wanted: int) -> Grant:
        """Lease up to ``wanted`` of the lowest free splits to ``worker``."""
        if self.finished:
            return Grant("finished")
        if not self.trained:
            first, last, kind = self.epoch * self.splits, (self.epoch + 1) * self.splits, "train"
            last = min(last, self.closed.floor + SPLIT_WINDOW)
            free = (s for s in range(max(first, self.closed.floor), last) if s not in self.closed)
        else:
            first, kind = self.epoch * self.evaluation_splits, "evaluate"
            free = (s for s in range(first, first + self.evaluation_splits) if s not in self.results)
        found: list[int] = []
        for split in free:
            if len(found) == wanted:
                break
            if (kind, split) not in self.leases:
                found.append(split)
        if not found:
            return Grant("wait")
        for split in found:
            self.leases[kind, split] = worker
        fresh = tuple(kind == "train" and not self.all_touched and s not in self.touched for s in found)
        if kind == "train":
            self.touched.update(found)
        return Grant(kind, tuple(found), fresh)

    def close(self, worker: int, split: int, samples: int, loss_sum: float, groups: int = 0) -> bool:
        """Close a training split; return False if it was closed already (a repeated report)."""
        if not 0 <= split < self.epochs * self.splits:
            raise NotFound(f"there is no training split {split}: the job has {self.epochs * self.splits}", split=split)
        if split in self.closed:
            return False
        self._may_end("train", worker, split)
        self.closed.add(split)
        self.samples += samples
        self.loss_sum += loss_sum
        self.steps += groups
        self._forget("train", split)
        return True

    def evaluate(self, worker: int, split: int, found: Found) -> bool:
        """Keep what an evaluation split found; return False if that was there already."""
        if not 0 <= split < self.epochs * self.evaluation_splits:
            raise NotFound(
                f"there is no evaluation split {split}: the job has {self.epochs * self.evaluation_splits}", split=split
            )
        if split in self.results or split < self.epoch * self.evaluation_splits:
            return False
        if not self.trained:
            raise LeaseLost(f"evaluation split {split} is not due: epoch {self.epoch} is still trained", split=split)
        self._may_end("evaluate", worker, split)
        check_alike(split, found, self.results.values())
        self.results[split] = found
        self._forget("evaluate", split)
        return True

    def _may_end(self, kind: str, worker: int, split: int) -> None:
        """Refuse a report about a split that was never leased to its sender.

        Leases are forgotten when the coordinator restarts. A report of work that was begun under one is true all the same,
        whoever was given the split since: every group is applied once, whoever sends it.
        """
        holder = self.leases.get((kind, split))
        if holder != worker and not (self.all_touched and self._due(kind, split)):
            raise LeaseLost(
                f"{kind} split {split} is leased to {holder or 'nobody'}, not to incarnation {worker}",
                split=split,
                holder=holder,
            )

    def _due(self, kind: str, split: int) -> bool:
        """Whether the split belongs to what is worked on now."""
        per_epoch = self.splits if kind == "train" else self.evaluation_splits
        return split // per_epoch == self.epoch if per_epoch else False

    def _forget(self, kind: str, split: int) -> None:
        self.leases.pop((kind, split), None)
        self.touched.discard(split)
        self.failures.pop((kind, split), None)

    def release(self, worker: int, kind: str, split: int, reason: str) -> bool:
        """Give a lease back; return False once too many workers met an error on the split."""
        if self.leases.get((kind, split)) != worker:
            return True
        del self.leases[kind, split]
        self.given_back += kind == "train"
        if reason:
            self.failures.setdefault((kind, split), {})[worker] = reason
        return len(self.failures.get((kind, split), ())) < MAX_FAILURES

    def vanished(self, most: int) -> None:
        """Count what a worker may have had, ``most`` splits, that ended before it could tell after a restart."""
        first, last = self.epoch * self.splits, min(self.epoch + 1, self.epochs) * self.splits
        nobodys = (s for s in range(first, last) if s not in self.closed and ("train", s) not in self.leases)
        self.given_back += sum(1 for _ in islice(nobodys, most))

    def keep_only(self, worker: int, held: set[tuple[str, int]]) -> None:
        """Free what is leased to ``worker`` without its knowing: the answer that said so never arrived."""
        for key in self.leased_to(worker):
            if key not in held:
                del self.leases[key]

    def claim(self, worker: int, held: set[tuple[str, int]]) -> None:
        """Lease to ``worker`` what it says it holds, as far as that is due and nobody else has it.

        For a coordinator that was restarted: its leases are forgotten, the work that was begun under them goes on.
        """
        for kind, split in held:
            ended = split in self.closed if kind == "train" else split in self.results
            if self._due(kind, split) and not ended:
                self.leases.setdefault((kind, split), worker)

    def leased_to(self, worker: int) -> list[tuple[str, int]]:
        """Return (kind, split) of all leases of a worker."""
        return sorted(key for key, holder in self.leases.items() if holder == worker)

    def found(self) -> list[Found]:
        """Return what evaluation has found so far, in order of split."""
        return [self.results[split] for split in sorted(self.results)]

    def finish_epoch(self, merged: Evaluation | None = None) -> EpochResult:
        """Begin the next epoch. Only when trained and evaluated. ``merged``: what was ``found``, None: to be merged here."""
        metrics, evaluated = merge(self.found(), self.metrics) if merged is None else merged
        loss = self.loss_sum / self.samples if self.samples else 0.0
        result = EpochResult(
            self.epoch, self.samples, loss, metrics, self.train_seconds, self.evaluate_seconds, evaluated
        )
        self.history.append(result)
        self.epoch += 1
        self.results, self.samples, self.loss_sum = {}, 0, 0.0
        self.train_seconds = self.evaluate_seconds = 0.0
        return result

    def best(self) -> EpochResult | None:
        """Return the epoch that the first metric says is best, the earliest of equals."""
        if not self.history or not self.metrics:
            return None
        first = self.metrics[0]
        return max(self.history, key=lambda r: (merit(first, r.metrics[first]), -r.epoch))

    def progress(self) -> dict[str, Any]:
        done = min(max(self.closed.floor - self.epoch * self.splits, 0) + len(self.closed.above), self.splits)
        return {
            "epoch": self.epoch,
            "epochs": self.epochs,
            "splits_closed": done,
            "splits": self.splits,
            "evaluated": len(self.results),
            "evaluation_splits": self.evaluation_splits,
            "samples": self.samples,
        }
