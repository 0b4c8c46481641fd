# SPDX-License-Identifier: Apache-2.0
"""Which optimizer a table or dense parameter has, and all its constants, as job files and manifests carry them.

Invariant: a spec that exists has constants that are in range, fit float32, and are read by the optimizer it names: one
that would be ignored is refused unless it has its default. Immutable, JSON-ready. Formulas: ``embedding/optimizers.py``.
"""

import math
from dataclasses import dataclass, field, fields

import numpy as np

from oarlock.embedding.schedule import Schedule, schedule_from_json
from oarlock.proto.errors import InvalidArgument

BIASES = ("row", "step")
LARGEST = 1e15  # of any constant, so that float32 holds it and its square

_ALL = frozenset({"l1", "l2", "clip_value", "clip_norm", "lower", "upper", "schedule"})
_ADAM = _ALL | {"beta1", "beta2", "epsilon", "bias"}
_FTRL = _ALL | {"beta"}

# What each optimizer reads, by itself or in the passes of embedding/regularise.py.
READS: dict[str, frozenset[str]] = {
    "sgd": _ALL | {"decay"},
    "momentum": _ALL | {"decay", "momentum"},
    "nesterov": _ALL | {"decay", "momentum"},
    "dcasgd": _ALL | {"decay", "delay"},
    "adagrad": _ALL | {"decay", "epsilon", "initial"},
    "rowwise_adagrad": _ALL | {"decay", "epsilon", "initial"},
    "decayed_adagrad": _ALL | {"decay", "epsilon", "rho"},
    "rmsprop": _ALL | {"decay", "epsilon", "rho"},
    "adadelta": _ALL | {"decay", "epsilon", "rho"},
    "adam": _ADAM,
    "adamw": _ADAM | {"decay"},
    "amsgrad": _ADAM | {"decay"},
    "lamb": _ADAM | {"decay"},
    "ftrl": _FTRL,
    "group_ftrl": _FTRL | {"l21"},
}
_INSTEAD = {("adam", "decay"): "adamw", ("ftrl", "l21"): "group_ftrl", ("sgd", "momentum"): "momentum"}


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer's name and constants; the learning rate travels in each push and is not part of it.

    ``initial``: adagrad's first accumulator. ``beta``: of ftrl. ``delay``: lambda of dcasgd. ``clip_value``,
    ``clip_norm``: bounds of a gradient's values and of its norm over the row, 0 = none. ``lower``, ``upper``: bounds of
    the weights, None = none. ``bias``: Adam's corrections count the row's own updates or the job's steps.
    """

    name: str = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    initial: float = 0.1
    momentum: float = 0.9
    rho: float = 0.9
    l1: float = 0.0
    l2: float = 0.0
    l21: float = 0.0
    decay: float = 0.0
    beta: float = 1.0
    delay: float = 0.04
    clip_value: float = 0.0
    clip_norm: float = 0.0
    lower: float | None = None
    upper: float | None = None
    bias: str = "row"
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InvalidArgument(f"optimizer.name = {self.name!r}: give a string")
        object.__setattr__(self, "schedule", schedule_from_json(self.schedule))
        self._check_ranges()
        reads = READS.get(self.name)  # an unknown name is refused, with the nearest one, by optimizer_of()
        for f in fields(self):
            default = Schedule() if f.name == "schedule" else f.default
            value = getattr(self, f.name)
            if reads is None or f.name == "name" or f.name in reads or value == default:
                continue
            instead = _INSTEAD.get((self.name, f.name))
            raise InvalidArgument(
                f"optimizer {self.name!r} does not use {f.name} = {value!r}: leave it out, or choose "
                + (repr(instead) if instead else _readers(f.name))
            )
        rests = self.initial if reads is not None and "initial" in reads else 0.0
        if reads is not None and "epsilon" in reads and not np.float32(self.epsilon) and not np.float32(rests):
            raise InvalidArgument(
                f"optimizer {self.name!r} with epsilon = {self.epsilon} would divide 0 by 0: give a float32 above 0"
            )

    def _check_ranges(self) -> None:
        if not isinstance(self.bias, str) or self.bias not in BIASES:
            raise InvalidArgument(f"optimizer.bias = {self.bias!r}: choose one of {', '.join(BIASES)}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("name", "bias", "schedule") or (value is None and f.name in ("lower", "upper")):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidArgument(f"optimizer.{f.name} = {value!r}: give a finite number")
            if not abs(value) <= LARGEST:
                raise InvalidArgument(f"optimizer.{f.name} = {value!r}: give a number of at most {LARGEST:g}")
            if f.name in ("beta1", "beta2", "momentum", "rho"):
                if not 0 <= value < 1:
                    raise InvalidArgument(f"optimizer.{f.name} = {value!r}: give a number in [0, 1)")
            elif value < 0 and f.name not in ("lower", "upper"):
                raise InvalidArgument(f"optimizer.{f.name} = {value!r}: give a number >= 0")
        if not np.float32(self.beta):
            raise InvalidArgument(f"optimizer.beta = {self.beta!r}: give a float32 above 0")
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise InvalidArgument(f"optimizer.lower = {self.lower} is above upper = {self.upper}")


def _readers(constant: str) -> str:
    return "one of " + ", ".join(sorted(name for name, reads in READS.items() if constant in reads))
