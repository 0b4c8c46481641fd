# SPDX-License-Identifier: Apache-2.0
"""Wide & Deep (Cheng et al., Wide & Deep Learning for Recommender Systems, DLRS 2016).

The wide part is a linear model over every field, every cross that the schema names, and the numbers; the deep part is an MLP over
the fields' vectors and the numbers. Both add up to one logit. A field's row holds its weight in the wide part first, trained
with FTRL as in the paper, then its vector, trained with Adam without momentum: one key, one pull and one push for both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from oarlock.client.job import JobSpec
from oarlock.data.transforms import Fitted
from oarlock.embedding.spec import Initializer, OptimizerSpec, Part, TableSpec
from oarlock.nn import (
    Linear,
    Model,
    Node,
    add,
    binary_cross_entropy,
    concat,
    dense_input,
    field_columns,
    lookup,
    pool,
    sigmoid,
)
from oarlock.proto.errors import InvalidArgument
from oarlock.recipes._click import ClickConfig, ClickWorkload, check_widths, optimizer_of, plan_click
from oarlock.worker.recipe import Plan, Rates

# 1. What a user may set


@dataclass(frozen=True)
class WideDeepConfig(ClickConfig):
    """``layers``: widths of the deep part. ``wide_l1``: of the wide weights, which makes those of rare keys exactly zero."""

    # Nothing multiplies two fields' vectors before the first layer, so small vectors and small steps would be slow to tell values
    # apart: chosen on a validation set (docs/click.md).
    OWN_RATES: ClassVar[Rates] = Rates(0.02, 0.001)

    row_scale: float = 0.2
    layers: tuple[int, ...] = (400, 400, 400)
    wide_l1: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        check_widths("layers", self.layers)
        if self.wide_l1 and self.optimizer:
            raise InvalidArgument(
                f"wide_l1 = {self.wide_l1} and optimizer = {self.optimizer!r} contradict each other: only ftrl, the wide part's "
                "own optimizer, makes weights zero; leave one of them out"
            )


# 2. The model


def table(config: WideDeepConfig) -> TableSpec:
    """Return the rows: a wide weight, then a vector, each with its optimizer."""
    wide = Part(1, optimizer_of(config, OptimizerSpec("ftrl", l1=config.wide_l1)), Initializer("zeros"))
    vector = optimizer_of(config, OptimizerSpec("adam", beta1=0.0))
    deep = Part(config.dim, vector, Initializer("normal", scale=config.row_scale))
    return TableSpec("fields", 1 + config.dim, parts=(wide, deep))


def model(config: WideDeepConfig, fitted: Fitted) -> Model:
    """Return the graph for the schema's numbers and fields."""
    fields = len(fitted.fields)
    rows = lookup("fields", table="fields", dim=1 + config.dim, fields=fields)
    wide = pool(field_columns(rows, 0, 1), fields)
    vectors = field_columns(rows, 1, 1 + config.dim)
    hidden: Node = vectors
    if fitted.width:
        numbers = dense_input("numbers", width=fitted.width)
        wide = add(wide, Linear(1, bias=False, name="wide_numbers")(numbers))
        hidden = concat([numbers, vectors])
    for i, width in enumerate(config.layers, 1):
        hidden = Linear(width, activation="relu", name=f"deep{i}")(hidden)
    logit = add(wide, Linear(1, name="score")(hidden))
    loss = binary_cross_entropy(logit, label="label")
    optimizer = optimizer_of(config, OptimizerSpec("adam"))
    return Model(score=sigmoid(logit), loss=loss, optimizer=optimizer, dense_dtype=config.dense_dtype)


# 3. The job


class WideDeepRecipe:
    """Plans jobs on a folder of tabular data with a schema (docs/data.md)."""

    Config = WideDeepConfig

    def plan(self, config: WideDeepConfig, data: Path, *, epochs: int) -> Plan:
        return plan_click(config, data, table, model)

    def workload(self, spec: JobSpec) -> ClickWorkload:
        return ClickWorkload(spec, WideDeepConfig(**spec.config), model)


recipe = WideDeepRecipe()
