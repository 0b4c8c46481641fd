# SPDX-License-Identifier: Apache-2.0
"""Neural collaborative filtering: GMF, MLP and NeuMF (He et al., Neural Collaborative Filtering, WWW 2017).

The data are pairs (user, item) that happened; each is trained with ``negatives`` drawn items of label 0. Evaluation ranks the
item that a user took last among listed others: HR@K and NDCG@K.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.columns import Arrays, ColumnSpec, offsets_of
from oarlock.data.files import files_from_json
from oarlock.data.interactions import list_test, list_train, load_catalogue, load_positives, load_test, read_info
from oarlock.data.negatives import NegativeSampler
from oarlock.data.ranking import rank_lists, sum_ranks
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.nn import Linear, Model, Node, binary_cross_entropy, columns, concat, lookup, multiply
from oarlock.proto.errors import InvalidArgument
from oarlock.worker.recipe import EvaluationBatch, Example, Plan, Rates

MODELS = ("neumf", "gmf", "mlp")


# 1. What a user may set


@dataclass(frozen=True)
class NcfConfig:
    """Zero means: chosen by the size of the data (``adapted``)."""

    model: str = "neumf"
    factors: int = 8
    layers: tuple[int, ...] = (64, 32, 16, 8)
    negatives: int = 4
    top_k: int = 10
    batch_samples: int = 0
    row_rate: float = 0.0
    dense_rate: float = 0.0
    final_rate: float = 1.0
    row_scale: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.model not in MODELS:
            raise InvalidArgument(f"ncf.model = {self.model!r}: choose one of {', '.join(MODELS)}")
        if len(self.layers) < 2 or any(n < 1 for n in self.layers) or self.layers[0] % 2:
            raise InvalidArgument(f"ncf.layers = {list(self.layers)}: give at least two widths, the first one even")
        for name, low in (("factors", 1), ("negatives", 1), ("top_k", 1), ("batch_samples", 0)):
            if getattr(self, name) < low:
                raise InvalidArgument(f"ncf.{name} = {getattr(self, name)}: give an integer >= {low}")
        for name in ("row_rate", "dense_rate", "final_rate", "row_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidArgument(f"ncf.{name} = {getattr(self, name)}: give a finite number >= 0")


# Measured on three public data sets of 44 thousand to a million pairs, and on two that were not used for choosing; see
# docs/ncf.md for the runs behind each number.
MANY_PAIRS = 256_000
BATCHES_PER_EPOCH = 48


def adapted(config: NcfConfig, *, pairs: int) -> NcfConfig:
    """Fill in what the config leaves open, from the number of training pairs.

    Up to ``MANY_PAIRS`` an epoch has few batches: larger ones with a higher dense rate do best, yet at least
    ``BATCHES_PER_EPOCH`` of them. Beyond, batches of 2048 samples rank better than larger ones, and there are plenty.
    """
    samples = pairs * (1 + config.negatives)
    many = pairs > MANY_PAIRS
    batch = 2048 if many else int(np.clip(samples // BATCHES_PER_EPOCH, 256, 4096))
    return replace(
        config,
        batch_samples=config.batch_samples or batch,
        row_rate=config.row_rate or 0.005,
        dense_rate=config.dense_rate or (0.001 if many else 0.004),
    )


# 2. The model


def model(config: NcfConfig) -> Model:
    """Return the graph. A user's and an item's row hold the GMF factors first, then half of the MLP's input."""
    gmf = config.factors if config.model != "mlp" else 0
    half = config.layers[0] // 2 if config.model != "gmf" else 0
    user = lookup("user", table="user", dim=gmf + half)
    item = lookup("item", table="item", dim=gmf + half)
    towers: list[Node] = []
    if gmf:
        towers.append(multiply(columns(user, 0, gmf), columns(item, 0, gmf)))
    if half:
        hidden = concat([columns(user, gmf, gmf + half), columns(item, gmf, gmf + half)])
        for i, width in enumerate(config.layers[1:], 1):
            hidden = Linear(width, activation="relu", name=f"mlp{i}")(hidden)
        towers.append(hidden)
    last = concat(towers) if len(towers) > 1 else towers[0]
    # LeCun uniform, as the published code has it for this layer.
    logit = Linear(1, name="score", initializer=Initializer("uniform", scale=(3 / last.width) ** 0.5))(last)
    return Model(score=logit, loss=binary_cross_entropy(logit, label="label"), optimizer=OptimizerSpec("adam"))


# 3. The job: data files, splits, tables

# Without momentum: a row is touched now and then, and what it would go on with is old by the time it is touched again.
ROW_OPTIMIZER = OptimizerSpec("adam", beta1=0.0)


class NcfRecipe:
    """Plans jobs on a folder that `oarlock data import ncf` or `oarlock data generate ncf` made."""

    Config = NcfConfig

    def plan(self, config: NcfConfig, data: Path, *, epochs: int) -> Plan:
        info = read_info(data)
        config = adapted(config, pairs=info.train_rows)
        built = model(config)
        rows = Initializer("normal", scale=config.row_scale)
        tables = tuple(
            TableSpec(name, dim, optimizer=ROW_OPTIMIZER, initializer=rows, blocks=_blocks(keys, dim))
            for (name, dim), keys in zip(sorted(built.tables.items()), (info.items, info.users), strict=True)
        )
        return Plan(
            config=asdict(config),
            files=list_train(data),
            evaluation_files=list_test(data),
            rows_per_split=_rows_per_split(info.train_rows, config),
            evaluation_rows_per_split=max(1, info.test_rows // 16),
            batch_rows=max(1, config.batch_samples // (1 + config.negatives)),
            tables=tables,
            model=built,
            metrics=(f"hr@{config.top_k}", f"ndcg@{config.top_k}"),
        )

    def workload(self, spec: JobSpec) -> "NcfWorkload":
        return NcfWorkload(spec)


def _rows_per_split(pairs: int, config: NcfConfig) -> int:
    """Return the pairs of a split: eight batches, so that they come out nearly full, but at least eight splits an epoch."""
    return max(1, min(8 * config.batch_samples // (1 + config.negatives), pairs // 8))


def _blocks(keys: int, dim: int) -> int:
    """Return a number of blocks: of 8 MiB at most with Adam's state, at least 16 so that several shards share the table."""
    size = keys * (2 * dim + dim) * 4
    return int(min(1 << 16, max(16, 1 << (max(1, size) >> 22).bit_length())))


# 4. The worker's side: batches with negatives, rates, ranking


class NcfWorkload:
    """One worker's NCF: the training pairs of all users in memory, to draw negatives that never happened."""

    columns = (ColumnSpec("user", "key"), ColumnSpec("item", "key"))
    evaluation_columns = (ColumnSpec("user", "key"), ColumnSpec("item", "key"), ColumnSpec("negatives", "key_list"))
    inputs = columns

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._config = NcfConfig(**spec.config)
        self.model = model(self._config)
        self.max_samples = max(spec.batch_rows * (1 + self._config.negatives), 8192)
        self._labels = np.zeros((spec.batch_rows, 1 + self._config.negatives), np.float32)
        self._labels[:, 0] = 1.0
        self._sampler: NegativeSampler

    def start(self) -> None:
        train = files_from_json(list(self._spec.files))
        test = files_from_json(list(self._spec.evaluation_files))
        catalogue = load_catalogue(train)
        if test:
            listed = load_test(test)
            catalogue = np.union1d(catalogue, listed.items)
            # A list is scored whole, however long it is.
            self.max_samples = max(self.max_samples, int(np.diff(listed.offsets).max(initial=0)))
        self._sampler = NegativeSampler(
            load_positives(train),
            catalogue,
            per_positive=self._config.negatives,
            seed=self._spec.seed,
        )

    def samples(self, rows: int) -> int:
        return rows * (1 + self._config.negatives)

    def encode(self, rows: Arrays, *, epoch: int, split: int, batch: int) -> Example:
        users, items = rows["user"], rows["item"]
        width = 1 + self._config.negatives
        drawn = np.empty((len(users), width), np.uint64)
        drawn[:, 0] = items
        drawn[:, 1:] = self._sampler.draw(users, epoch=epoch, split=split, batch=batch)
        label = self._labels[: len(users)].reshape(-1)
        return Example(
            len(users) * width, {"user": np.repeat(users, width), "item": drawn.reshape(-1)}, {"label": label}
        )

    def unlabelled(self, rows: Arrays) -> Example:
        return Example(len(rows["user"]), {"user": rows["user"], "item": rows["item"]}, {})

    def rates(self, done: float) -> Rates:
        """Go in a straight line to ``final_rate`` times the first rate (1: the same rate throughout)."""
        factor = 1.0 + (self._config.final_rate - 1.0) * min(1.0, done)
        return Rates(self._config.row_rate * factor, self._config.dense_rate * factor)

    def evaluation(self, rows: Arrays) -> Iterator[EvaluationBatch]:
        users, positives = rows["user"], rows["item"]
        negatives, offsets = rows["negatives"], rows[offsets_of("negatives")]
        sizes = np.diff(offsets) + 1
        if sizes.max(initial=0) > self.max_samples:
            raise InvalidArgument(f"a list of {sizes.max() - 1} negatives is over the limit of {self.max_samples - 1}")
        first = 0
        while first < len(users):
            ends = np.cumsum(sizes[first:])
            last = first + int(np.searchsorted(ends, self.max_samples, side="right"))
            lists = np.concatenate([[0], ends[: last - first]]).astype(np.int64)
            items = np.empty(lists[-1], np.uint64)
            heads = np.zeros(len(items), np.bool_)
            heads[lists[:-1]] = True
            items[heads] = positives[first:last]
            items[~heads] = negatives[offsets[first] : offsets[last]]
            keys = {"user": np.repeat(users[first:last], sizes[first:last]), "item": items}
            yield EvaluationBatch(Example(len(items), keys, {}), (lists, items))
            first = last

    def sums(self, batch: EvaluationBatch, scores: NDArray[np.float32]) -> list[float]:
        lists, items = batch.context
        found = sum_ranks(rank_lists(scores, lists, items), self._config.top_k)
        return [float(found.lists), float(found.hits), float(found.ndcg)]


recipe = NcfRecipe()
