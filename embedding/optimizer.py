# SPDX-License-Identifier: Apache-2.0
"""The optimizers: one table of rows, each pure functions over a row's weights and state.

| name    | state columns  | step (g = gradient, t = the row's own number of updates)                              |
|---------|----------------|---------------------------------------------------------------------------------------|
| sgd     | 0              | W -= rate g                                                                           |
| adagrad | dim: acc       | acc += g^2; W -= rate g / (sqrt(acc) + epsilon); acc starts at `initial`              |
| adam    | 2 dim + 1: m v t | m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g^2;                             |
|         |                | W -= rate / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)                 |

Duchi, Hazan, Singer, JMLR 2011 (adagrad); Kingma, Ba, ICLR 2015 (adam). In adam a row that gets no gradient does not
move: t counts the row's updates, not the job's. Invariant: names never change meaning; state columns of a name neither.
No state here, any thread.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.spec import OptimizerSpec
from oarlock.embedding.update import update_adagrad, update_adam, update_sgd
from oarlock.proto.errors import InvalidArgument

Update = Callable[[NDArray[np.int64], int, NDArray[np.float32], float, NDArray[np.float64]], Any]


@dataclass(frozen=True)
class Optimizer:
    """One optimizer: its state's width, the state's first values, and its kernel (see ``embedding/update.py``)."""

    name: str
    state_columns: Callable[[int], int]
    initial_state: Callable[[OptimizerSpec, int], NDArray[np.float32]]
    update: Update


def _zeros(columns: Callable[[int], int]) -> Callable[[OptimizerSpec, int], NDArray[np.float32]]:
    return lambda spec, dim: np.zeros(columns(dim), np.float32)


OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("sgd", lambda dim: 0, _zeros(lambda dim: 0), update_sgd),
        Optimizer("adagrad", lambda dim: dim, lambda spec, dim: np.full(dim, spec.initial, np.float32), update_adagrad),
        Optimizer("adam", lambda dim: 2 * dim + 1, _zeros(lambda dim: 2 * dim + 1), update_adam),
    )
}


def optimizer_of(spec: OptimizerSpec) -> Optimizer:
    """Return the optimizer a spec names; InvalidArgument suggests the nearest name."""
    found = OPTIMIZERS.get(spec.name)
    if found is None:
        near = difflib.get_close_matches(spec.name.lower(), OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidArgument(
            f"optimizer {spec.name!r} is unknown; {hint}choose one of {', '.join(sorted(OPTIMIZERS))}"
        )
    return found


def hyper_of(spec: OptimizerSpec) -> NDArray[np.float64]:
    """Return float64[4]: the kernels' form (beta1, beta2, epsilon, initial) of an optimizer's constants."""
    return np.array([spec.beta1, spec.beta2, spec.epsilon, spec.initial], np.float64)
