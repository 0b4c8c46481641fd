# SPDX-License-Identifier: Apache-2.0
import json
import math
from dataclasses import asdict

import pytest

from oarlock.embedding.optimizer_spec import OptimizerSpec
from oarlock.embedding.schedule import READS, SCHEDULES, Schedule, schedule_from_json
from oarlock.proto.errors import InvalidArgument

EXAMPLES = [
    Schedule(),
    Schedule(warm_up=4),
    Schedule("step", every=3, gamma=0.5),
    Schedule("exponential", gamma=0.9, warm_up=2),
    Schedule("cosine", steps=10, floor=0.1, warm_up=3),
    Schedule("1cycle", steps=20, rise=0.4, divide=10, final_divide=100),
]
each = pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: f"{s.kind}-{s.warm_up}")


def test_every_kind_has_an_example():
    assert {s.kind for s in EXAMPLES} == set(SCHEDULES) == set(READS)


def factors(schedule, n):
    return [schedule.factor(step) for step in range(1, n + 1)]


def test_constant_and_warm_up():
    assert factors(Schedule(), 3) == [1, 1, 1]
    assert factors(Schedule(warm_up=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert Schedule(warm_up=4).factor(0) == 0.25


def test_step_and_exponential():
    assert factors(Schedule("step", every=3, gamma=0.5), 8) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert factors(Schedule("exponential", gamma=0.5), 4) == [1, 0.5, 0.25, 0.125]
    assert Schedule("exponential", gamma=0.5, every=10).factor(6) == pytest.approx(math.sqrt(0.5))
    assert factors(Schedule("exponential", gamma=0.5, warm_up=2), 5) == [0.5, 1, 1, 0.5, 0.25]


def test_cosine_ends_at_its_floor_and_stays_there():
    values = factors(Schedule("cosine", steps=10, floor=0.1), 14)
    assert values[0] == 1
    assert values[5] == pytest.approx(0.55)
    assert values[10:] == pytest.approx([0.1] * 4)
    assert values[:11] == sorted(values[:11], reverse=True)


def test_1cycle_rises_to_one_and_falls_far_below_its_start():
    values = factors(Schedule("1cycle", steps=20, rise=0.4, divide=10, final_divide=100), 25)
    assert values[0] == pytest.approx(0.1)
    assert values[7] == 1 == max(values)
    assert values[19:] == pytest.approx([0.001] * 6)
    assert values[:8] == sorted(values[:8])
    assert values[7:20] == sorted(values[7:20], reverse=True)


def test_factors_are_the_library_functions_without_the_library():
    cosine = Schedule("cosine", steps=997)
    for step in range(1, 999):
        exact = (1 + math.cos(math.pi * min(step - 1, 997) / 997)) / 2
        assert cosine.factor(step) == pytest.approx(exact, rel=1e-13, abs=1e-15)
    for gamma, every in ((0.9, 1), (0.1, 1000), (0.999999, 7), (1, 3), (1e-300, 11)):
        for step in (1, 2, 3, 10, 999, 12345):
            for kind, exponent in (("exponential", (step - 1) / every), ("step", (step - 1) // every)):
                factor = Schedule(kind, gamma=gamma, every=every).factor(step)
                assert factor == pytest.approx(gamma**exponent, rel=1e-11, abs=1e-300)


@each
def test_a_schedule_comes_back_from_json_and_is_the_same_for_any_step(schedule):
    assert schedule_from_json(json.loads(json.dumps(asdict(schedule)))) == schedule
    assert OptimizerSpec("sgd", schedule=asdict(schedule)).schedule == schedule
    for step in (0, 1, 2, 10**6, 2**63 - 1):
        assert 0 <= schedule.factor(step) <= 1


@pytest.mark.torch
@pytest.mark.parametrize("schedule", [s for s in EXAMPLES if s.kind != "constant"], ids=lambda s: s.kind)
def test_equals_pytorch(schedule):
    torch = pytest.importorskip("torch", reason="torch is not installed: make setup-torch")
    schedule = Schedule(**(asdict(schedule) | {"warm_up": 0}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    of = torch.optim.lr_scheduler
    other = {
        "step": lambda: of.StepLR(optimizer, schedule.every, schedule.gamma),
        "exponential": lambda: of.ExponentialLR(optimizer, schedule.gamma),
        "cosine": lambda: of.CosineAnnealingLR(optimizer, schedule.steps, schedule.floor),
        "1cycle": lambda: of.OneCycleLR(
            optimizer,
            1.0,
            total_steps=schedule.steps,
            pct_start=schedule.rise,
            div_factor=schedule.divide,
            final_div_factor=schedule.final_divide,
            cycle_momentum=False,
        ),
    }[schedule.kind]()
    for step in range(1, 11 if schedule.kind == "cosine" else 20):
        assert schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        other.step()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"kind": "linear"}, "schedule 'linear': choose one of constant, step"),
        ({"kind": 3}, "schedule 3: choose one of"),
        ({"kind": "cosine", "gamma": 0.5, "steps": 5}, "'cosine' does not use gamma = 0.5"),
        ({"kind": "1cycle", "steps": 20, "warm_up": 5}, "'1cycle' does not use warm_up = 5"),
        ({"warm_up": -1}, "warm_up = -1: give an integer >= 0"),
        ({"warm_up": 1.5}, "warm_up = 1.5: give an integer"),
        ({"warm_up": 1 << 63}, "warm_up = 9223372036854775808: give an integer >= 0 and below 2.63"),
        ({"warm_up": True}, "warm_up = True: give an integer"),
        ({"kind": "step", "every": 0}, "every = 0: give an integer >= 1"),
        ({"kind": "step", "gamma": 0}, r"gamma = 0: give a number in \(0, 1\]"),
        ({"kind": "step", "gamma": 1.5}, "gamma = 1.5"),
        ({"kind": "step", "gamma": math.nan}, "gamma = nan: give a finite number"),
        ({"kind": "step", "gamma": "1"}, "gamma = '1': give a finite number"),
        ({"kind": "cosine"}, "needs steps >= 1"),
        ({"kind": "cosine", "steps": 4, "floor": 2}, r"floor = 2: give a number in \[0, 1\]"),
        ({"kind": "1cycle", "steps": 2}, r"rise \* steps must be more than 1"),
        ({"kind": "1cycle", "steps": 9, "rise": 1.0}, "rise = 1.0: give a number between 0 and 1"),
        ({"kind": "1cycle", "steps": 9, "divide": 0.5}, "divide = 0.5, final_divide = 10000.0: give numbers >= 1"),
        ({"speed": 1}, "unknown field 'speed'"),
        ([], "expected an object, got list"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values, match):
    with pytest.raises(InvalidArgument, match=match):
        schedule_from_json(values)
