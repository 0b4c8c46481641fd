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
import json, pkgutil, importlib
import numpy as np
import oarlock.embedding
from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.hashing import blocks_of
from oarlock.embedding.initial import first_rows
from oarlock.embedding.keys import KeySorter, gather, merge
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.table import Table

def wire(array):
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)

sorter = KeySorter()
for number, name in enumerate(("sgd", "adagrad", "adam")):
    for kind in ("zeros", "constant", "uniform", "normal"):
        table = Table(TableSpec(kind, 4 + number, OptimizerSpec(name), Initializer(kind), 1 << number), seed=2**64 - 1)
        for block in range(1 << number):
            table.adopt(block)
        dense = DenseParameter(DenseSpec("w", (3, 5), OptimizerSpec(name), Initializer(kind)), seed=1)
        dense.adopt(0)
        for step in range(4):
            raw = np.random.default_rng(step).integers(0, 300, 200 * step, dtype=np.uint64)
            for form in (wire, np.asarray):
                ranks = np.arange(1 << number, dtype=np.int32)
                found = sorter.build(form(raw), table.salt, table.bits, form(ranks))
                request = [form(part) for part in (found.keys, found.blocks, found.counts)]
                rows = np.empty((len(found.keys), table.spec.dim), np.float32)
                table.check(*request, unique=step % 2 == 0)
                table.pull(*request, rows)
                spread = np.empty((len(raw), table.spec.dim), np.float32)
                gather(form(rows), form(found.inverse), spread)
                merge(form(spread), form(found.inverse), rows)
                table.push(*request, form(rows), rate=1 if step else 0.1)
                dense.push_block(0, form(np.ones(15, np.float32)), rate=1 if step else 0.1)
                table.import_block(0, type(table.export_block(0))(*map(form, table.export_block(0))))
        blocks_of(raw, table.salt, table.bits, np.empty(len(raw), np.int32))
        first_rows(table._origin, raw, table._first, np.empty((len(raw), 3), np.float32))
counts = {}
for info in pkgutil.iter_modules(oarlock.embedding.__path__):
    module = importlib.import_module("oarlock.embedding." + info.name)
    for name, value in vars(module).items():
        if hasattr(value, "signatures") and value.__module__ == module.__name__:
            counts[module.__name__ + "." + name] = len(value.signatures)
print(json.dumps(counts))
"""


def test_every_kernel_is_compiled_once_whatever_form_arrays_and_numbers_come_in():
    counts = json.loads(run(["-c", TRAINING]))
    assert {name: n for name, n in counts.items() if n > 1} == {}
    # A kernel that only other kernels call shows no form of its own when its callers come from the cache.
    called = {name.removeprefix("oarlock.embedding.") for name, n in counts.items() if n == 1}
    assert called >= {
        *("hashing.mix64", "hashing.blocks_of", "initial.first_rows", "initial.first_dense"),
        *("index.check_groups", "index.check_keys", "index.crowded", "index.find_rows", "index.create_rows"),
        *("index.rehash", "index.export_rows", "index.import_rows", "slab.gather_rows"),
        *("update.refuse", "update.update_sgd", "update.update_adagrad", "update.update_adam"),
        *("keys.group_keys", "keys.merge_rows", "keys.gather_inverse"),
    }


def test_the_heart_of_the_suite_holds_without_compiling():
    folder = PACKAGE / "tests" / "embedding"
    part = [
        str(folder / f"test_{name}.py") for name in ("table_machine", "index", "slab", "pointer", "dense", "initial")
    ]
    assert "passed" in run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *part], NUMBA_DISABLE_JIT="1")
