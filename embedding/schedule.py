# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: a factor on the rate of a push, by the step at which the push is made.

| kind        | factor; s = steps before this one, less those of the warm-up        | as in PyTorch                        |
|-------------|----------------------------------------------------------------------|--------------------------------------|
| constant    | 1                                                                    | -                                    |
| step        | gamma^floor(s / every)                                               | StepLR                               |
| exponential | gamma^(s / every)                                                    | ExponentialLR, with every = 1        |
| cosine      | floor + (1 - floor) (1 + cos(pi s / steps)) / 2, then floor          | CosineAnnealingLR, eta_min = floor   |
| 1cycle      | 1 / divide up to 1 over the share ``rise`` of the steps, then down   | OneCycleLR, max_lr = 1, cosine       |
|             | to 1 / (divide * final_divide), both along half a cosine             |                                      |

A warm-up of n steps multiplies by 1/n, 2/n, ... 1 and only then begins the schedule proper (Goyal et al. 2017). 1cycle
(Smith, Topin 2017) has a warm-up of its own and takes none.

Invariant: a pure function of (schedule, step), made of + - * / on floats and of decimal arithmetic, both the same on every
CPU and with every C library: so shards that apply it agree to the bit. No state, any thread.
"""

import decimal
import math
from dataclasses import dataclass, fields
from functools import lru_cache

from oarlock.proto.errors import InvalidArgument

SCHEDULES = ("constant", "step", "exponential", "cosine", "1cycle")

# What each kind reads; a constant that it would ignore is refused.
READS: dict[str, frozenset[str]] = {
    "constant": frozenset({"warm_up"}),
    "step": frozenset({"warm_up", "gamma", "every"}),
    "exponential": frozenset({"warm_up", "gamma", "every"}),
    "cosine": frozenset({"warm_up", "steps", "floor"}),
    "1cycle": frozenset({"steps", "rise", "divide", "final_divide"}),
}


@dataclass(frozen=True)
class Schedule:
    """A schedule and its constants: ``warm_up``, ``every`` and ``steps`` (the whole length) count steps of the job."""

    kind: str = "constant"
    warm_up: int = 0
    steps: int = 0
    every: int = 1
    gamma: float = 0.1
    floor: float = 0.0
    rise: float = 0.3
    divide: float = 25.0
    final_divide: float = 1e4

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in SCHEDULES:
            raise InvalidArgument(f"schedule {self.kind!r}: choose one of {', '.join(SCHEDULES)}")
        for name, least in (("warm_up", 0), ("steps", 0), ("every", 1)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or not least <= count < 1 << 63:
                raise InvalidArgument(f"schedule.{name} = {count!r}: give an integer >= {least} and below 2^63")
        for name in ("gamma", "floor", "rise", "divide", "final_divide"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidArgument(f"schedule.{name} = {value!r}: give a finite number")
        for f in fields(self):
            if f.name != "kind" and f.name not in READS[self.kind] and getattr(self, f.name) != f.default:
                raise InvalidArgument(
                    f"schedule {self.kind!r} does not use {f.name} = {getattr(self, f.name)!r}: leave it out, "
                    "or choose another schedule"
                )
        if not 0 < self.gamma <= 1:
            raise InvalidArgument(f"schedule.gamma = {self.gamma}: give a number in (0, 1]")
        if not 0 <= self.floor <= 1:
            raise InvalidArgument(f"schedule.floor = {self.floor}: give a number in [0, 1]")
        if not 0 < self.rise < 1:
            raise InvalidArgument(f"schedule.rise = {self.rise}: give a number between 0 and 1")
        if self.divide < 1 or self.final_divide < 1:
            raise InvalidArgument(
                f"schedule.divide = {self.divide}, final_divide = {self.final_divide}: give numbers >= 1"
            )
        if self.kind == "cosine" and self.steps < 1:
            raise InvalidArgument("schedule 'cosine' needs steps >= 1, the length of the whole run")
        if self.kind == "1cycle" and self.rise * self.steps <= 1:
            raise InvalidArgument(
                f"schedule '1cycle' with steps = {self.steps}, rise = {self.rise}: rise * steps must be more than 1"
            )

    def factor(self, step: int) -> float:
        """Return the factor at ``step`` (1 is the first; what lies before counts as the first)."""
        before = max(int(step) - 1, 0)
        if before < self.warm_up:
            return (before + 1) / self.warm_up
        s = before - self.warm_up
        if self.kind == "step":
            return _power(self.gamma, s // self.every)
        if self.kind == "exponential":
            return _power(self.gamma, s // self.every) * _root(self.gamma, s % self.every, self.every)
        if self.kind == "cosine":
            return _anneal(1.0, self.floor, min(s, self.steps) / self.steps)
        if self.kind == "1cycle":
            first, last = 1.0 / self.divide, 1.0 / self.divide / self.final_divide
            top, end = self.rise * self.steps - 1.0, self.steps - 1.0
            if s <= top:
                return _anneal(first, 1.0, s / top)
            return _anneal(1.0, last, (min(s, end) - top) / (end - top))
        return 1.0


def _power(base: float, exponent: int) -> float:
    """Return base^exponent by repeated squaring."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@lru_cache(maxsize=1024)
def _root(base: float, numerator: int, denominator: int) -> float:
    """Return base^(numerator / denominator) for a base in (0, 1] and a fraction below 1."""
    if numerator == 0:
        return 1.0
    with decimal.localcontext(decimal.Context(prec=25)):
        return float(decimal.Decimal(base) ** (decimal.Decimal(numerator) / decimal.Decimal(denominator)))


def _anneal(start: float, end: float, share: float) -> float:
    """Return the value at ``share`` in [0, 1] of the way along half a cosine; exactly start and end at its ends."""
    if share <= 0.0 or share >= 1.0:
        return start if share <= 0.0 else end
    x = math.pi * (0.5 - share)  # cos(pi share) = sin(x), by its series: |x| <= pi / 2 leaves an error below 1e-15
    total = 1.0
    for k in range(22, 0, -2):
        total = 1.0 - total * x * x / (k * (k + 1))
    return end + (start - end) / 2.0 * (1.0 + x * total)


def schedule_from_json(values: object) -> Schedule:
    """Return the Schedule of its JSON form, or itself; InvalidArgument names what does not fit."""
    if isinstance(values, Schedule):
        return values
    if not isinstance(values, dict):
        raise InvalidArgument(f"optimizer.schedule: expected an object, got {type(values).__name__}")
    known = [f.name for f in fields(Schedule)]
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise InvalidArgument(f"optimizer.schedule: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return Schedule(**values)
