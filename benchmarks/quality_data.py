# SPDX-License-Identifier: Apache-2.0
"""Generated clicks whose best AUC is known: a few fields with values of long-tailed frequency, and planted tastes.

The model: every value of a field has a weight and a vector; a row is a click with probability
    p = 1 / (1 + exp(-(bias + sum of weights + sum over pairs of fields of the dot products of their vectors)))
So nothing ranks the test rows better, in expectation, than p itself. Invariant: a pure function of the arguments.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oarlock.data.scores import Scores

FIELDS = (("user", 2000), ("item", 4000), ("hour", 24), ("place", 60), ("weather", 9), ("source", 400))
_WIDTH = 4


def generate_clicks(folder: Path, rows: int, *, seed: int = 0) -> float:
    """Write train.tsv, test.tsv (a tenth) and schema.toml; return the AUC of p on the test rows."""
    rng = np.random.default_rng(seed)
    logit = np.full(rows, -1.0)
    total = np.zeros((rows, _WIDTH))
    squares = np.zeros(rows)
    columns: list[NDArray[np.int64]] = []
    for _, values in FIELDS:
        share = 1.0 / np.arange(1, values + 1) ** 0.8
        drawn = rng.choice(values, rows, p=share / share.sum())
        vectors = rng.normal(scale=0.35, size=(values, _WIDTH))
        logit += rng.normal(scale=0.5, size=values)[drawn]
        total += vectors[drawn]
        squares += np.square(vectors[drawn]).sum(axis=1)
        columns.append(drawn)
    logit += 0.5 * (np.square(total).sum(axis=1) - squares)
    chance = 1.0 / (1.0 + np.exp(-logit))
    clicked = (rng.random(rows) < chance).astype(np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    test = rows // 10
    for name, run in (("test.tsv", slice(0, test)), ("train.tsv", slice(test, rows))):
        lines = np.stack([clicked[run], *(column[run] for column in columns)], axis=1)
        np.savetxt(folder / name, lines, fmt="%d", delimiter="\t")
    (folder / "schema.toml").write_text(schema(), encoding="utf-8")
    scores = Scores()
    scores.add(chance[:test].astype(np.float32), clicked[:test].astype(np.float32))
    return float(scores.metrics()["auc"] or 0.0)


def schema() -> str:
    names = ", ".join(f'"{name}"' for name in ("label", *(name for name, _ in FIELDS)))
    fields = "".join(f'\n[[fields]]\ncolumn = "{name}"\n' for name, _ in FIELDS)
    return f'format = "tsv"\ncolumns = [{names}]\n\n[label]\ncolumn = "label"\npositive = ["1"]\n{fields}'
