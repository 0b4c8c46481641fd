# SPDX-License-Identifier: Apache-2.0
"""DLRM (Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019).

The bottom MLP turns the numbers into a vector as wide as a field's; the dot products of all pairs of vectors, behind that vector
itself, go into the top MLP. Without numbers the pairs are those of the fields, and the vectors go into the top MLP beside them.
"""

from dataclasses import dataclass
from pathlib import Path

from oarlock.client.job import JobSpec
from oarlock.data.transforms import Fitted
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.nn import (
    Linear,
    Model,
    Node,
    binary_cross_entropy,
    concat,
    dense_input,
    interactions,
    lookup,
    sigmoid,
)
from oarlock.recipes._click import ClickConfig, ClickWorkload, check_widths, optimizer_of, plan_click
from oarlock.worker.recipe import Plan

# 1. What a user may set


@dataclass(frozen=True)
class DlrmConfig(ClickConfig):
    """``bottom`` and ``top``: widths of the MLPs, without the bottom's last layer (``dim``) and the top's (1)."""

    bottom: tuple[int, ...] = (512, 256, 64)
    top: tuple[int, ...] = (512, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bottom", "top"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            check_widths(name, getattr(self, name))


# 2. The model


def table(config: DlrmConfig) -> TableSpec:
    """Return the rows: a vector of each field's value."""
    rows = Initializer("normal", scale=config.row_scale)
    return TableSpec("fields", config.dim, optimizer_of(config, OptimizerSpec("adam", beta1=0.0)), rows)


def model(config: DlrmConfig, fitted: Fitted) -> Model:
    """Return the graph for the schema's numbers and fields."""
    vectors = lookup("fields", table="fields", dim=config.dim, fields=len(fitted.fields))
    if fitted.width:
        hidden: Node = dense_input("numbers", width=fitted.width)
        for i, width in enumerate((*config.bottom, config.dim), 1):
            hidden = Linear(width, activation="relu", name=f"bottom{i}")(hidden)
        hidden = concat([hidden, interactions(hidden, vectors)])
    else:
        hidden = concat([vectors, interactions(None, vectors)])
    for i, width in enumerate(config.top, 1):
        hidden = Linear(width, activation="relu", name=f"top{i}")(hidden)
    logit = Linear(1, name="score")(hidden)
    loss = binary_cross_entropy(logit, label="label")
    optimizer = optimizer_of(config, OptimizerSpec("adam"))
    return Model(score=sigmoid(logit), loss=loss, optimizer=optimizer, dense_dtype=config.dense_dtype)


# 3. The job


class DlrmRecipe:
    """Plans jobs on a folder of tabular data with a schema (docs/data.md)."""

    Config = DlrmConfig

    def plan(self, config: DlrmConfig, data: Path, *, epochs: int) -> Plan:
        return plan_click(config, data, table, model)

    def workload(self, spec: JobSpec) -> ClickWorkload:
        return ClickWorkload(spec, DlrmConfig(**spec.config), model)


recipe = DlrmRecipe()
