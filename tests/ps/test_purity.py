# SPDX-License-Identifier: Apache-2.0
"""An update is a pure function of (block, message): U1, U3, U7 of the semantics, as far as they are built.

Two shards with different pasts, clocks and generators give the same bits to a block that was the same before.
"""

import ast
import random
import time
from pathlib import Path

import numpy as np
import pytest
import rig

from oarlock.client.push import PushIdentity, PushMessage, RowGradients, cut_push, recut_push
from oarlock.embedding.policy import Admission
from oarlock.embedding.schedule import Schedule
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.proto.arrays import unpack
from oarlock.proto.bulk import inlined
from oarlock.proto.shard_pb2 import PushRequest
from oarlock.ps import view

ROOT = Path(__file__).resolve().parents[2]
NORMAL = Initializer("normal", 0.1)
FADING = Schedule("exponential", gamma=0.5, every=100)
OPTIMIZERS = [
    OptimizerSpec("sgd", schedule=FADING),
    OptimizerSpec("adagrad"),
    OptimizerSpec("adam"),
    OptimizerSpec("adam", bias="step"),
]
NAMES = ["sgd with a schedule", "adagrad", "adam", "adam by the step"]
# What makes a shard's update: nothing of it may ask for the time, or draw. The spill file measures how long it reads.
UPDATE = [
    *sorted(p for p in (ROOT / "embedding").glob("*.py") if p.stem != "spill_file"),
    *(ROOT / "ps" / f"{n}.py" for n in ("shard", "marks", "request", "sweep")),
]


def job_of(optimizer):
    drawn = Admission("probability", probability=0.5)
    tables = (
        TableSpec("user", 3, optimizer, NORMAL, 4),
        TableSpec("rounded", 3, optimizer, NORMAL, 4, dtype="bfloat16", admission=drawn, absent="zeros"),
        TableSpec("other", 2, optimizer, NORMAL, 4),
    )
    return rig.Job(rig.spec_of(tables, (DenseSpec("w", (7,), optimizer, NORMAL),)), shards=1).place()


def message_of(job, split, group, table, keys, value, step=None):
    keyset = rig.group_keys(job.layout, job.routes(), table, keys)
    dim = job.layout.tables[job.layout.table_index[table]].dim
    gradients = (np.arange(len(keyset.keys) * dim, dtype=np.float32).reshape(-1, dim) - 3) * np.float32(value)
    dense = np.linspace(-1, 1, 7, dtype=np.float32) if table == "user" else None
    identity = PushIdentity(split, group, step=17 * group if step is None else step)
    (made,) = cut_push(job.layout, job.routes(), identity, {table: RowGradients(keyset, gradients, 0.1)}, dense, 0.05)
    made.request.header.CopyFrom(job.header(0))
    return made.bulk.SerializeToString()


def user_blocks(job):
    numbers = [*range(8), job.layout.dense_base]
    images = [view.image_of(job.shards[0], n) for n in numbers]
    return [(i.keys.tobytes(), i.weights.tobytes(), i.state.tobytes(), i.marks, i.seq) for i in images]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
def test_nothing_but_block_and_message_enters_an_update(optimizer, monkeypatch):
    """U1: neither the clock, nor a generator, nor what else the shard has done, or at which steps."""
    pushes = [
        message_of(job_of(optimizer), s, g, table, range(g, 40, s + 1), 0.3)
        for s, table in enumerate(("user", "rounded", "user", "rounded"))
        for g in range(4)
    ]
    quiet = job_of(optimizer)
    for push in pushes:
        quiet.services[0].push(PushRequest.FromString(push))
    busy = job_of(optimizer)
    now = iter(range(10**9, 10**10, 12345))
    for name in ("time", "monotonic", "perf_counter", "time_ns"):
        monkeypatch.setattr(time, name, lambda: next(now))
    random.seed(99)
    np.random.seed(99)
    for n, push in enumerate(pushes):
        # Work on other blocks, pulls of these ones, and draws that nobody should see.
        other = message_of(busy, 50 + n, 0, "other", range(n, 30), 2.0, step=1000 * n)
        busy.services[0].push(PushRequest.FromString(other))
        busy.rows("user", range(60))
        random.random(), np.random.rand()
        busy.services[0].push(PushRequest.FromString(push))
        busy.services[0].push(PushRequest.FromString(push))
    monkeypatch.undo()
    assert user_blocks(busy) == user_blocks(quiet)
    assert busy.shards[0].counters != quiet.shards[0].counters


def test_an_update_asks_for_no_time_and_draws_nothing():
    for path in UPDATE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"time", "random", "datetime", "secrets", "uuid"} & set(names), f"{path}:{node.lineno}"
            attribute = node.attr if isinstance(node, ast.Attribute) else ""
            assert attribute not in ("random", "default_rng"), f"{path}:{node.lineno} draws"


def test_kernels_of_shards_use_plain_arithmetic_only():
    """U3: integers and + - * / sqrt, no power, no library function that may differ between two CPUs."""
    seen = 0
    for path in sorted((ROOT / "embedding").glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            decorators = [ast.unparse(d) for d in getattr(function, "decorator_list", [])]
            if not any(d in ("jit", "callback") or d.startswith("jit(") for d in decorators):
                continue
            seen += 1
            assert not any("fastmath" in d for d in decorators)
            for node in ast.walk(function):
                assert not isinstance(node, ast.Pow), f"{path.name}: {function.name} takes a power"
                if isinstance(node, ast.Attribute):
                    wrong = ("exp", "log", "log2", "pow", "power", "sin", "cos", "tanh", "cbrt", "hypot", "dot")
                    assert node.attr not in wrong, f"{path.name}: {function.name} calls {node.attr}"
    assert seen > 15


def test_rate_and_step_travel_in_the_push_wherever_it_goes():
    """U1: the shard has neither of its own; a push that is cut anew for another owner keeps both."""
    job = job_of(OPTIMIZERS[0])
    push = PushRequest.FromString(message_of(job, 4, 2, "user", range(9), 1.0))
    numbers = np.concatenate([unpack(push.tables[0].keys.blocks, np.int32, "blocks"), [job.layout.dense_base]])
    sent = PushMessage(job.addresses[0], push, [], numbers.astype(np.int32))
    for message in (push, *(inlined(m.bulk) for m in recut_push(job.layout, job.routes(), [(sent, sent.numbers)]))):
        assert (message.step, message.tables[0].rate, message.dense[0].rate) == (34, 0.1, 0.05)
