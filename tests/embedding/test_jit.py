# SPDX-License-Identifier: Apache-2.0
"""What the decorator promises: fresh code after an edit, one compiled form each, the same without compiling."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import embedding_reference as reference
import pytest

PACKAGE = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not reference.JIT, reason="about compiled kernels")


def run(code, *, path=None, cache=None, **variables):
    environment = os.environ | variables
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    done = subprocess.run(
        [sys.executable, *code], env=environment, cwd=PACKAGE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CALLER = """
import numpy as np
from oarlock.embedding import initial
from oarlock.embedding.jit import kernel_folder
out = np.empty(8, np.float32)
initial.first_dense(np.uint64(1), 0, np.array([2.0, 0.0, 1.0]), out)
print(initial.__file__, kernel_folder(), sum(initial.first_dense.stats.cache_hits.values()), out.tolist(), sep=";")
"""


def test_an_edit_of_a_callee_in_another_module_is_seen_and_an_unchanged_source_is_not_compiled_again(tmp_path):
    package = tmp_path / "src" / "oarlock"
    for name in ("embedding", "proto"):
        shutil.copytree(PACKAGE / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACKAGE / "src" / "oarlock" / "__init__.py", package)
    cache = tmp_path / "cache"
    before, again = (run(["-c", CALLER], path=package.parent, cache=cache).strip().split(";") for _ in range(2))
    assert before[0] == str(package / "embedding" / "initial.py")
    assert Path(before[1]).is_relative_to(cache)
    assert (before[2], again[2]) == ("0", "1")
    assert again[3] == before[3]
    callee = package / "embedding" / "hashing.py"
    text = callee.read_text()
    assert "return x ^ (x >> _SHIFT_3)" in text
    callee.write_text(text.replace("return x ^ (x >> _SHIFT_3)", "return np.uint64(0)"))
    after = run(["-c", CALLER], path=package.parent, cache=cache).strip().split(";")
    assert after[2] == "0"
    assert json.loads(after[3]) == [-1.0] * 8 != json.loads(before[3])


TRAINING = """
import importlib, json, pkgutil, re
from pathlib import Path
import numpy as np
import oarlock.embedding
from oarlock.embedding import cold
from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.hashing import blocks_of
from oarlock.embedding.initial import constants, first_rows
from oarlock.embedding.keys import KeySorter, gather, merge
from oarlock.embedding.optimizers import OPTIMIZERS
from oarlock.embedding.spec import (
    Admission, DenseSpec, Eviction, Guard, Initializer, OptimizerSpec, Part, TableSpec
)
from oarlock.embedding.table import Table

cold.LEAST_ROWS = 24
cold.TIDY_RECORDS = 1
ADMISSIONS = [
    Admission("always"), Admission("count", 2), Admission("sketch", 2, capacity=100), Admission("probability", 1, 1),
    Admission("probability", 1, 0.5), Admission("score", nonclick=1, click=0.5), Admission("score"),
]
EVICTIONS = [
    Eviction(), Eviction(age=2), Eviction(norm=1, score=1), Eviction(occurrences=2, score=0.5, decay=1),
    Eviction(max_bytes=1), Eviction(max_bytes=1, order="frequent"),
]

def wire(array):
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)

def spec(number, name, kind):
    parts = ()
    dim = 4 + number % 3
    optimizer, initializer = OptimizerSpec(name, clip_norm=number % 2), Initializer(kind, number % 2, 0.5)
    if number % 5 == 4:
        dim, parts = 3, (Part(1, OptimizerSpec("ftrl"), Initializer("zeros")), Part(2, optimizer, initializer))
        optimizer, initializer = OptimizerSpec(), Initializer()
    eviction = EVICTIONS[number % 6]
    bounded = eviction.max_bytes > 0
    guard = Guard(limit=1e6 if number % 2 else 1, sample=number % 3, undo=0 if number % 3 == 1 else number % 3)
    return TableSpec(
        kind, dim, optimizer, initializer, 1 << number % 3, dtype=("float32", "float16", "bfloat16", "int8")[number % 4],
        parts=parts, absent=("first", "zeros")[number % 2], usage=number % 2 == 0, admission=ADMISSIONS[number % 7],
        eviction=eviction, guard=guard, memory_bytes=0 if bounded or guard.undo else 1,
    )

sorter = KeySorter()
spilled = 0
for number in range(30):
    name = list(OPTIMIZERS)[number % len(OPTIMIZERS)]
    kind = ("zeros", "constant", "uniform", "normal")[number % 4]
    table = Table(spec(number, name, kind), seed=2**64 - 1, spill_folder=Path(FOLDER))
    for block in range(table.spec.blocks):
        table.adopt(block)
    dense = DenseParameter(DenseSpec("w", (3, 5), OptimizerSpec(name), Initializer(kind)), seed=1)
    dense.adopt(0)
    for step in range(4):
        raw = np.random.default_rng(step).integers(0, 300, 200 * step, dtype=np.uint64)
        for form in (wire, np.asarray):
            view = table.begin_view(step)
            ranks = np.arange(table.spec.blocks, dtype=np.int32)
            found = sorter.build(form(raw), table.salt, table.bits, form(ranks))
            request = [form(part) for part in (found.keys, found.blocks, found.counts)]
            rows = np.empty((len(found.keys), table.spec.dim), np.float32)
            table.check(*request, unique=step % 2 == 0)
            table.pull(*request, rows)
            spread = np.empty((len(raw), table.spec.dim), np.float32)
            gather(form(rows), form(found.inverse), spread)
            merge(form(spread), form(found.inverse), rows)
            more = {}
            if step % 2:
                more["occurrences"] = form(found.occurrences().astype(np.uint32))
                more["clicks"] = form(np.ones(len(found.keys), np.float32))
            table.push(*request, form(rows), rate=1 if step else 0.1, step=np.int64(step) if step > 1 else 1, **more)
            dense.push_block(0, form(np.ones(15, np.float32)), rate=1 if step else 0.1)
            if table.spec.guard.undo:
                table.undo(form(found.keys), steps=step + 1)
            view.content(0)
            table.commit_view(step)
            view = table.begin_view(step)
            view.changes(0)
            table.sweep(0, tick=step, buckets=3)
            spilled += int(table.descriptors[:, cold.SPILLED_ROWS].sum())
            rows = table.export_block(0)
            sketch = rows.sketch
            table.import_block(0, type(rows)(*map(form, rows[:-1]), sketch))
            table.sweep(0, tick=step, buckets=3)
            for key in found.keys[:2].tolist():
                table.explain(key, tick=None if step else 3)
    blocks_of(raw, table.salt, table.bits, np.empty(len(raw), np.int32))
    first_rows(table.first.origin, raw, constants(table.spec.initializer), np.empty((len(raw), 3), np.float32))
    table.drop(0)
    table.close()
assert spilled > 0
counts = {}
for info in pkgutil.iter_modules(oarlock.embedding.__path__):
    module = importlib.import_module("oarlock.embedding." + info.name)
    for name, value in vars(module).items():
        if hasattr(value, "signatures") and value.__module__ == module.__name__:
            # A constant that one kernel hands to another is a form of its own, which belongs to the caller's code.
            forms = {re.sub(r"Literal\\[(\\w+)\\]\\([^)]*\\)", r"\\1", str(form)) for form in value.signatures}
            forms = {re.sub(r"\\bint\\b", "int64", form) for form in forms}
            counts[module.__name__ + "." + name] = len(forms)
print(json.dumps(counts))
"""


def test_every_kernel_is_compiled_once_whatever_form_arrays_and_numbers_come_in(tmp_path):
    counts = json.loads(run(["-c", TRAINING.replace("FOLDER", repr(str(tmp_path)))]))
    assert {name: n for name, n in counts.items() if n > 1} == {}
    # A kernel that only other kernels call shows no form of its own when its callers come from the cache.
    called = {name.removeprefix("oarlock.embedding.") for name, n in counts.items() if n == 1}
    assert called >= {
        *("hashing.mix64", "hashing.blocks_of", "initial.first_rows", "check.check_groups", "check.check_keys"),
        *("pull.pull_rows", "push.push_rows", "index.rehash", "index.list_entries", "undo.undo_rows"),
        *("content.export_rows", "content.import_rows", "content.import_waiting", "sketch.count_keys"),
        *("evict.sweep_buckets", "evict.list_counter", "evict.evict_entries", "explain.find_word", "explain.read_slot"),
        *("cold_kernels.choose_cold", "cold_kernels.pack_rows", "cold_kernels.spill_entries", "cold_kernels.unspill"),
        *("cold_kernels.find_spilled", "cold_kernels.list_spilled", "cold_kernels.decode_records"),
        *("cold_kernels.split_records", "lock.enter_mutex", "lock.leave_mutex", "lock.shut", "lock.reopen"),
        *("view_kernels.list_unchanged", "view_kernels.copy_unchanged", "view_kernels.count_stale"),
        *("keys.group_keys", "keys.merge_rows", "keys.gather_inverse"),
    }


def test_the_heart_of_the_suite_holds_without_compiling():
    folder = PACKAGE / "tests" / "embedding"
    names = ["admission", "aim", "block", "cold", "dense", "evict", "explain", "index", "initial", "lock", "memory"]
    names += ["pointer", "slab", "table_machine", "table_threads", "tombstones", "undo", "view", "view_machine"]
    part = [str(folder / f"test_{name}.py") for name in names]
    assert "passed" in run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *part], NUMBA_DISABLE_JIT="1")
