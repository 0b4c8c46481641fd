# SPDX-License-Identifier: Apache-2.0
"""JobSpec: all that the processes of one job agree on, fixed when the job is created.

Invariant: it does not change while the job lives; the coordinator stores it and gives it to whoever joins.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from oarlock.client.autoscale import Autoscale, check_autoscale, read_autoscale
from oarlock.client.autoscale import to_values as autoscale_values
from oarlock.client.closed import SPLIT_WINDOW
from oarlock.client.compression import WireSpec, check_compression, read_compression
from oarlock.client.warm import WarmStart, read_warm_start, to_values
from oarlock.embedding.spec import DenseSpec, OptimizerSpec, TableSpec, dense_from_json, table_from_json, to_json
from oarlock.proto.errors import InvalidArgument

MODES = ("async", "ssp", "geo", "sync", "hybrid")
# In which a fixed number of logical workers make each step of the dense parameters together.
RANKED = ("sync", "hybrid")
# In which rows are pushed and applied as each worker comes: what was kept of them lacks nothing that the mode promises.
CACHED = ("async", "hybrid")

# A lease that outlasts this is as good as none.
MAX_LEASE_SECONDS = 1e9
# Of a worker, each kind: beyond it more processes serve better.
MAX_THREADS = 256

# What a job is doing. "gathering": shards join; "training"; "writing": a checkpoint, nobody trains; "stopping": workers
# finish their groups and leave; then one of the three ends.
GATHERING, TRAINING, WRITING, STOPPING = "gathering", "training", "writing", "stopping"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
OVER = (DONE, STOPPED, FAILED)

# What follows when all copies of a block are lost: all go back to the last cut, or those blocks alone do.
ROLLBACK, RELOAD = "rollback", "reload"
MAX_REPLICAS, MAX_MOVES_IN_FLIGHT, MAX_REBALANCE_SECONDS = 2, 4096, 86400

_PLAN = (
    "mode",
    "staleness",
    "ranks",
    "accumulate",
    "batch_rows",
    "splits",
    "rows_per_split",
    "evaluation_splits",
    "evaluation_rows_per_split",
    "blas_threads",
    "epochs",
)

# Each has its parts of a step on every shard.
MAX_RANKS = 4096


def check_ranks(mode: str, ranks: int, prefetch: int) -> None:
    """Raise InvalidArgument for ranks, or a depth of pulls, that do not go with the mode."""
    if isinstance(ranks, bool) or not isinstance(ranks, int) or not 0 <= ranks <= MAX_RANKS:
        raise InvalidArgument(f"ranks = {ranks!r}: give an integer from 0 to {MAX_RANKS}")
    if ranks and mode not in RANKED:
        raise InvalidArgument(
            f"ranks = {ranks} and mode = {mode!r} contradict each other: only sync and hybrid have ranks; give mode = 'sync' or "
            "'hybrid', or ranks = 0"
        )
    if mode == "sync" and prefetch > 1:
        raise InvalidArgument(
            f"mode = 'sync' and prefetch = {prefetch} contradict each other: no rows are pulled before the step that they "
            "have to hold; give prefetch = 1 (groups are read and encoded ahead all the same), or mode = 'async'"
        )


def check_copies(
    mode: str, replicas: int, on_loss: str, moves_in_flight: int, servers: int, *, rebalance_seconds: float = 0.0
) -> None:
    """Raise InvalidArgument for settings of copies that are no such, or do not go with others."""
    if isinstance(replicas, bool) or not isinstance(replicas, int) or not 0 <= replicas <= MAX_REPLICAS:
        raise InvalidArgument(f"replicas = {replicas!r}: give an integer from 0 to {MAX_REPLICAS}")
    moves = moves_in_flight
    if isinstance(moves, bool) or not isinstance(moves, int) or not 1 <= moves <= MAX_MOVES_IN_FLIGHT:
        raise InvalidArgument(f"moves_in_flight = {moves!r}: give an integer from 1 to {MAX_MOVES_IN_FLIGHT}")
    every = rebalance_seconds
    if isinstance(every, bool) or not isinstance(every, int | float) or not 0 <= every <= MAX_REBALANCE_SECONDS:
        raise InvalidArgument(f"rebalance_seconds = {every!r}: give a number from 0 (never) to {MAX_REBALANCE_SECONDS}")
    if on_loss not in (ROLLBACK, RELOAD):
        raise InvalidArgument(f"on_loss = {on_loss!r}: choose {ROLLBACK!r} or {RELOAD!r}")
    if on_loss == RELOAD and mode in RANKED:
        raise InvalidArgument(
            f"on_loss = {on_loss!r} and mode = {mode!r} contradict each other: all blocks of its dense parameters are at one "
            f"step; give on_loss = {ROLLBACK!r}, or mode = 'async', 'ssp' or 'geo'"
        )
    check_replicas(replicas, servers)


def check_replicas(replicas: int, servers: int) -> None:
    """Raise InvalidArgument if there are not as many servers as a block has copies."""
    if replicas >= servers:
        raise InvalidArgument(
            f"replicas = {replicas} and servers = {servers} contradict each other: each copy of a block is on another server; "
            f"give servers = {replicas + 1} or more, or replicas = {servers - 1}"
        )


@dataclass(frozen=True)
class JobSpec:
    """A job: identity, parameters, data and the recipe that trains it.

    ``files`` and ``evaluation_files`` are JSON forms of data files (path, size, row groups); the splits of an epoch follow
    from them and ``rows_per_split``. ``config`` is the recipe's own configuration. ``batch_rows`` counts raw rows.
    ``transforms``: how raw columns become what the model is fed, as fitted when the job was planned (JSON, empty: none).
    ``staleness`` is the s of ssp(s): a worker's rows hold all groups of every worker that are more than s behind its own.
    ``ranks``: of sync and hybrid, the R logical workers whose gradients make a step, in hybrid of the dense parameters alone; any
    number of processes host them. 0 in other modes.
    ``accumulate``: batches of a group, whose gradients are pushed as one; it is the k of geo(k), where a worker steps rows of its
    own and pushes the difference that the group made.
    ``compression``: in which form values travel, by table, "dense" for the dense parameters; float32 where nothing is said.
    ``metrics`` names the evaluation's means; the first one decides which epoch was best. A checkpoint is written after
    every ``checkpoint_epochs`` epochs (0: only at the end), and while an epoch is trained after so many steps, or seconds, since
    the last one (0: not). ``gate_seconds``: how long workers that do not shut their gate are waited for.
    ``checkpoint_keep_best``: so many of those after the best epochs stay beside the ``checkpoints_kept`` newest.
    ``checkpoint_path``: a folder or URL (empty: ``checkpoints`` in the job's folder), with options of its file system, none of
    them secret (``checkpoint/place.py``).
    ``compute_threads``: batches that a worker computes at once; ``blas_threads``: threads of each matrix product.
    ``restore``: of a job that goes on with another one's training, the cut that it begins with, as a path or URL; empty: none.
    ``warm_start``: what the rows and dense parameters of a new job begin with.
    ``replicas``: shards that have a copy of each block, beside its owner. ``on_loss``: what follows when all of them are lost:
    ``rollback``, all go back to the last cut, or ``reload``, those blocks alone do. ``moves_in_flight``: blocks that wait at once
    for another owner. ``rebalance_seconds``: how often it is looked whether some shard has much more than others (0: never).
    ``autoscale``: by what the numbers of servers and workers follow the load while the job trains; they begin as said here.
    """

    job: str
    name: str
    seed: int
    recipe: str
    tables: tuple[TableSpec, ...]
    dense: tuple[DenseSpec, ...]
    files: tuple[Any, ...]
    evaluation_files: tuple[Any, ...]
    splits: int
    evaluation_splits: int
    rows_per_split: int
    evaluation_rows_per_split: int
    batch_rows: int
    epochs: int
    servers: int
    workers: int
    metrics: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    transforms: str = ""
    mode: str = "async"
    staleness: int = 0
    ranks: int = 0
    checkpoint_epochs: int = 1
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 0.0
    checkpoints_kept: int = 2
    checkpoint_keep_best: int = 0
    checkpoint_path: str = ""
    checkpoint_options: dict[str, Any] = field(default_factory=dict)
    checkpoint_compress: str = ""
    reader: str = "auto"
    open_splits: int = 2
    prefetch: int = 1
    accumulate: int = 1
    compression: dict[str, WireSpec] = field(default_factory=dict)
    compute_threads: int = 1
    blas_threads: int = 1
    lease_seconds: float = 5.0
    heartbeat_seconds: float = 0.5
    gate_seconds: float = 2.0
    restore: str = ""
    warm_start: WarmStart = field(default_factory=WarmStart)
    replicas: int = 0
    on_loss: str = ROLLBACK
    moves_in_flight: int = 16
    rebalance_seconds: float = 30.0
    autoscale: Autoscale = field(default_factory=Autoscale)

    def __post_init__(self) -> None:
        try:
            valid = len(bytes.fromhex(self.job)) == 16
        except (ValueError, TypeError):
            valid = False
        if not valid:
            raise InvalidArgument(f"job id {self.job!r}: give 32 hexadecimal digits")
        if self.mode not in MODES:
            raise InvalidArgument(f"mode {self.mode!r}: choose one of {', '.join(MODES)}")
        for name in (
            "splits",
            "rows_per_split",
            "batch_rows",
            "epochs",
            "servers",
            "workers",
            "open_splits",
            "prefetch",
            "accumulate",
            "checkpoints_kept",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgument(f"{name} = {value!r}: give an integer >= 1")
        for name in ("evaluation_splits", "checkpoint_epochs", "checkpoint_steps", "checkpoint_keep_best", "staleness"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidArgument(f"{name} = {value!r}: give an integer >= 0")
        for name in ("compute_threads", "blas_threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_THREADS:
                raise InvalidArgument(f"{name} = {value!r}: give an integer from 1 to {MAX_THREADS}")
        for name in ("checkpoint_path", "checkpoint_compress"):
            if not isinstance(getattr(self, name), str):
                raise InvalidArgument(f"{name} = {getattr(self, name)!r}: give text")
        if not isinstance(self.checkpoint_options, dict):
            raise InvalidArgument(f"checkpoint_options = {self.checkpoint_options!r}: give a table")
        if self.staleness and self.mode != "ssp":
            raise InvalidArgument(
                f"staleness = {self.staleness} and mode = {self.mode!r} contradict each other: only ssp bounds it; "
                "give mode = 'ssp', or staleness = 0"
            )
        for table in self.tables:
            if table.cache is not None and self.mode not in CACHED:
                raise InvalidArgument(
                    f"mode = {self.mode!r} and the cache of table {table.name} contradict each other: kept rows lack updates "
                    f"that {self.mode} promises; give mode = 'async' or 'hybrid', or no cache"
                )
        if self.mode == "geo":
            self._check_geo()
        check_ranks(self.mode, self.ranks, self.prefetch)
        check_copies(
            self.mode,
            self.replicas,
            self.on_loss,
            self.moves_in_flight,
            self.servers,
            rebalance_seconds=self.rebalance_seconds,
        )
        check_autoscale(self.autoscale, self.replicas)
        if self.mode in RANKED and self.ranks < 1:
            raise InvalidArgument(
                f"mode = {self.mode!r} needs ranks: give ranks = 1 or more, the workers that make a step"
            )
        if self.mode == "hybrid" and not (self.tables and self.dense):
            what, other = ("dense parameters", "async") if self.tables else ("tables", "sync")
            raise InvalidArgument(
                f"mode = 'hybrid' and a recipe without {what} contradict each other: it trains the two in different ways; "
                f"give mode = {other!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise InvalidArgument(f"seed = {self.seed!r}: give an integer from 0 to 2^64 - 1")
        for name in ("heartbeat_seconds", "lease_seconds", "gate_seconds", "checkpoint_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidArgument(f"{name} = {value!r}: give a number of seconds")
        if not (0 < self.gate_seconds < MAX_LEASE_SECONDS and 0 <= self.checkpoint_seconds < MAX_LEASE_SECONDS):
            raise InvalidArgument(
                f"gate_seconds = {self.gate_seconds} must be above 0, checkpoint_seconds = {self.checkpoint_seconds} at least 0, "
                f"and both below {MAX_LEASE_SECONDS:g}"
            )
        if not 0 < self.heartbeat_seconds < self.lease_seconds < MAX_LEASE_SECONDS:
            raise InvalidArgument(
                f"heartbeat_seconds = {self.heartbeat_seconds} must be above 0 and below lease_seconds = "
                f"{self.lease_seconds}, and that below {MAX_LEASE_SECONDS:g}"
            )
        if not isinstance(self.restore, str) or "\0" in self.restore:
            raise InvalidArgument(f"restore = {self.restore!r}: give the path or URL of a checkpoint")
        if self.restore and self.warm_start:
            raise InvalidArgument(
                f"restore = {self.restore!r} and warm_start of {self.warm_start.path!r} contradict each other: a job goes on "
                "with another one's training, or begins anew with some of its rows"
            )
        names = [t.name for t in self.tables] + [d.name for d in self.dense]
        for name in names:
            if names.count(name) > 1:
                raise InvalidArgument(
                    f"two parameters are named {name!r}; every table and dense parameter needs its own name"
                )

        check_compression(self.compression, tuple(t.name for t in self.tables), self.mode)

    def _check_geo(self) -> None:
        """Raise InvalidArgument unless the rows that a worker steps by itself move as the shards' would."""
        specs: tuple[TableSpec | DenseSpec, ...] = (*self.tables, *self.dense)
        for spec in specs:
            parts = spec.parts if isinstance(spec, TableSpec) else ()
            for optimizer in [part.optimizer for part in parts] or [spec.optimizer]:
                if optimizer != OptimizerSpec("sgd"):
                    raise InvalidArgument(
                        f"mode = 'geo' and the optimizer of {spec.name}, {optimizer.name!r}, contradict each other: workers step "
                        "rows of their own, so choose 'sgd' without clipping, decay, bounds or a schedule, or mode = 'async'"
                    )

    def groups(self, rows: int) -> int:
        """Return how many groups a split of ``rows`` raw rows has."""
        batches = -(-rows // self.batch_rows)
        return -(-batches // self.accumulate)

    def plan(self) -> dict[str, Any]:
        """Return what else than its manifest's own fields decides how a job goes on from a cut, JSON-ready."""
        return {
            **{name: getattr(self, name) for name in _PLAN},
            "evaluation_files": list(self.evaluation_files),
            "metrics": list(self.metrics),
            # May be megabytes, and follow from the data and the configuration.
            "transforms": hashlib.sha256(self.transforms.encode()).hexdigest(),
        }

    @property
    def closed_window(self) -> int:
        """How far above the closed floor a split may be that is trained or closed; ranks end those of an epoch in any order."""
        return max(SPLIT_WINDOW, self.splits) if self.ranks else SPLIT_WINDOW

    @property
    def job_bytes(self) -> bytes:
        return bytes.fromhex(self.job)

    def to_json(self) -> str:
        values = {k: v for k, v in asdict(self).items() if k not in ("tables", "dense")}
        values["warm_start"] = to_values(self.warm_start)
        values["autoscale"] = autoscale_values(self.autoscale)
        values["tables"] = [to_json(t) for t in self.tables]
        values["dense"] = [to_json(d) for d in self.dense]
        return json.dumps(values, indent=1)

    @staticmethod
    def from_json(text: str) -> "JobSpec":
        try:
            values = json.loads(text)
            values["tables"] = tuple(table_from_json(t) for t in values["tables"])
            values["dense"] = tuple(dense_from_json(d) for d in values["dense"])
            values["files"] = tuple(values["files"])
            values["evaluation_files"] = tuple(values["evaluation_files"])
            values["metrics"] = tuple(values["metrics"])
            values["compression"] = read_compression(values.get("compression", {}), "job")
            values["warm_start"] = read_warm_start(values.get("warm_start", {}), "job")
            values["autoscale"] = read_autoscale(values.get("autoscale", {}), "job")
            return JobSpec(**values)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidArgument(f"this is no job description: {type(error).__name__}: {error}") from error
