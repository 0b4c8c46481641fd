# SPDX-License-Identifier: Apache-2.0
"""The optimizers: one table of rows, each pure functions over a row's weights and state.

g = gradient after clipping and L2, e = epsilon, b1 b2 = beta1 beta2, d = width of the row. An update happens only to rows
that a push names; all of a row's state is in its columns. A dense block is one row as wide as the block.

| name            | state         | update                                                                            |
|-----------------|---------------|-----------------------------------------------------------------------------------|
| sgd             | -             | W -= rate g                                                                       |
| momentum        | b             | b = momentum b + g; W -= rate b [1]                                               |
| nesterov        | b             | b = momentum b + g; W -= rate (g + momentum b) [1]                                |
| dcasgd          | c             | h = g + delay g^2 c; c = -rate h; W += c [2]                                      |
| adagrad         | a             | a += g^2; W -= rate g / (sqrt(a) + e); a starts at `initial` [3]                  |
| rowwise_adagrad | a: one column | a += sum(g^2) / d; W -= rate g / (sqrt(a) + e); a starts at `initial` [4]         |
| decayed_adagrad | a             | a = rho a + (1 - rho) g^2; W -= rate g / (sqrt(a) + e) [5]                        |
| rmsprop         | a             | the same function [6]                                                             |
| adadelta        | a, b          | a = rho a + (1 - rho) g^2; h = sqrt(b + e) / sqrt(a + e) g;                       |
|                 |               | b = rho b + (1 - rho) h^2; W -= rate h [7]                                        |
| adam            | m, v, t       | m += (1 - b1)(g - m); v = b2 v + (1 - b2) g^2;                                    |
|                 |               | W -= rate / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + e) [8]                     |
| adamw           | m, v, t       | W *= 1 - rate decay, then as adam [9]                                             |
| amsgrad         | m, v, x, t    | as adamw with x = max(x, v) in place of v in the update of W [10]                 |
| lamb            | m, v, t       | u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + e) + decay W;                    |
|                 |               | W -= rate |W| / |u| u, the ratio being 1 where a norm is 0 [11]                   |
| ftrl            | z, n          | z += g - (sqrt(n + g^2) - sqrt(n)) / rate W; n += g^2;                            |
|                 |               | W = -s / ((beta + sqrt(n)) / rate + l2), s = sign(z) max(|z| - l1, 0) [12]        |
| group_ftrl      | z, n          | as ftrl, with s max(1 - l21 sqrt(d) / |s|, 0) in place of s, |s| over the row [13] |

bias: t counts the row's own updates ("row"), or is the step of the job ("step"), and then the column stays 0.
dcasgd: the paper compensates by the distance between W now and the copy that the worker computed on, kept per worker; here
the row's last step c stands for it, which is right for a gradient that is late by one update of that row.
ftrl: z starts where the closed form gives the row's first weights, W = 0 giving z = 0 as in the paper; a value that has seen
only gradients of 0 is left alone. The weights scale with the rate of the push: keep it constant. At rates below 1e-15
nothing changes. decayed_adagrad and rmsprop differ in name only: rmsprop is PyTorch's, not centered and without momentum.
lamb and group_ftrl take norms over the row; with rowwise_adagrad they are the ones whose dense results depend on the cut.

[1] Sutskever et al. ICML 2013, in PyTorch's form without dampening. [2] Zheng et al. ICML 2017, DC-ASGD-c.
[3] Duchi, Hazan, Singer, JMLR 2011. [4] the same, one sum per row as in FBGEMM. [5] Paddle's DecayedAdagrad.
[6] Tieleman, Hinton 2012. [7] Zeiler 2012. [8] Kingma, Ba, ICLR 2015. [9] Loshchilov, Hutter, ICLR 2019.
[10] Reddi, Kale, Kumar, ICLR 2018. [11] You et al. ICLR 2020. [12] McMahan et al. KDD 2013.
[13] Ni et al. CIKM 2019; with per-value denominators as Yue et al. ECML PKDD 2021; sqrt(d) after Yuan, Lin 2006.

Invariant: names never change meaning; state columns of a name neither. No state here, any thread.
"""

import difflib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding import update_row as at
from oarlock.embedding.callback import Callback
from oarlock.embedding.optimizer_spec import OptimizerSpec
from oarlock.embedding.regularise import OWN_DECAY, OWN_L1_L2
from oarlock.embedding.update_adagrad import (
    update_adadelta,
    update_adagrad,
    update_rmsprop,
    update_rowwise_adagrad,
)
from oarlock.embedding.update_adam import update_adam, update_amsgrad, update_lamb
from oarlock.embedding.update_ftrl import update_ftrl, update_group_ftrl
from oarlock.embedding.update_momentum import update_dcasgd, update_momentum, update_nesterov, update_sgd
from oarlock.proto.errors import InvalidArgument


@dataclass(frozen=True)
class Optimizer:
    """One optimizer: its state is ``per_weight`` columns for each weight and then ``per_row`` columns.

    ``norms``: the update of one weight depends on the other weights of its row, so rows cannot be cut.
    """

    name: str
    update: Callback
    per_weight: int
    per_row: int = 0
    starts_at_initial: bool = False
    norms: bool = False

    def state_columns(self, dim: int) -> int:
        return self.per_weight * dim + self.per_row

    def initial_state(self, spec: OptimizerSpec, dim: int) -> NDArray[np.float32]:
        """Return the first state of a row: float32[state_columns(dim)]."""
        return np.full(self.state_columns(dim), spec.initial if self.starts_at_initial else 0.0, np.float32)

    def hyper(self, spec: OptimizerSpec) -> NDArray[np.float64]:
        """Return the constants as the kernels take them: float64[CONSTANTS], the same length for every optimizer."""
        hyper = np.zeros(at.CONSTANTS, np.float64)
        for position, value in (
            (at.BETA1, spec.beta1),
            (at.BETA2, spec.beta2),
            (at.EPSILON, spec.epsilon),
            (at.MOMENTUM, spec.momentum),
            (at.RHO, spec.rho),
            (at.L1, spec.l1),
            (at.L2, spec.l2),
            (at.L21, spec.l21),
            (at.DECAY, spec.decay),
            (at.BETA, spec.beta),
            (at.DELAY, spec.delay),
            (at.BY_STEP, spec.bias == "step"),
            (at.CLIP_VALUE, spec.clip_value),
            (at.CLIP_NORM, spec.clip_norm),
            (at.PASS_L1, 0.0 if self.name in OWN_L1_L2 else spec.l1),
            (at.PASS_L2, 0.0 if self.name in OWN_L1_L2 else spec.l2),
            (at.PASS_DECAY, 0.0 if self.name in OWN_DECAY else spec.decay),
            (at.LOWER, -math.inf if spec.lower is None else spec.lower),
            (at.UPPER, math.inf if spec.upper is None else spec.upper),
        ):
            hyper[position] = value
        return hyper


OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("sgd", update_sgd, 0),
        Optimizer("momentum", update_momentum, 1),
        Optimizer("nesterov", update_nesterov, 1),
        Optimizer("dcasgd", update_dcasgd, 1),
        Optimizer("adagrad", update_adagrad, 1, starts_at_initial=True),
        Optimizer("rowwise_adagrad", update_rowwise_adagrad, 0, 1, starts_at_initial=True, norms=True),
        Optimizer("decayed_adagrad", update_rmsprop, 1),
        Optimizer("rmsprop", update_rmsprop, 1),
        Optimizer("adadelta", update_adadelta, 2),
        Optimizer("adam", update_adam, 2, 1),
        Optimizer("adamw", update_adam, 2, 1),
        Optimizer("amsgrad", update_amsgrad, 3, 1),
        Optimizer("lamb", update_lamb, 2, 1, norms=True),
        Optimizer("ftrl", update_ftrl, 2),
        Optimizer("group_ftrl", update_group_ftrl, 2, norms=True),
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
