# SPDX-License-Identifier: Apache-2.0
"""After the warm-up a shard compiles nothing, and loads nothing from the cache, whatever its tables are and it is asked for."""

import json
import subprocess
import sys
from pathlib import Path

import numba
import pytest

HERE = Path(__file__).resolve().parent

# In a process of its own: in this one other tests have called everything already.
PROGRAM = """
import json, sys, tempfile
from pathlib import Path

sys.path[:0] = sys.argv[1:]
import numpy as np
from numba.core.dispatcher import Dispatcher

import rig
from test_block_policies import EVERYTHING, TABLES, checkpoint, close, job_of, train
from oarlock.embedding.callback import Callback
from oarlock.embedding.optimizers import OPTIMIZERS
from oarlock.embedding.optimizer_spec import OptimizerSpec
from oarlock.embedding.spec import Admission, CacheSpec, DenseSpec, Eviction, Guard, Initializer, TableSpec
from oarlock.embedding.warmup import warm_up
from oarlock.client.packed import CHUNK, encode_dense, encode_rows, packed, read_form
from oarlock.proto.arrays import unpack
from oarlock.proto.shard_pb2 import Codec, PullRequest, ShardStatsRequest


def loaded():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("oarlock."):
            for value in vars(module).values():
                if isinstance(value, Dispatcher):
                    found[f"{value.py_func.__module__}.{value.__name__}"] = len(value.signatures)
                elif isinstance(value, Callback):
                    found[f"{value.__module__}.{value.__name__}"] = int(value._address > 0)
    return found


def use(table, folder):
    job = job_of(table).place()
    train(job, np.random.default_rng(0), range(6))
    shard, own = job.shards[0], job.shards[0].tables[0]
    rig.state(job)
    job.rows("user", range(900))
    if table.cache is not None:
        asked = rig.group_keys(job.layout, job.routes(), "user", np.arange(900))
        own.pull_newer(asked.keys, asked.blocks, asked.counts, np.zeros(len(asked.keys), np.uint32), bound=0)
    for block in own.owned.tolist():
        own.sweep(block, tick=1000, buckets=3)
    if table.guard.undo:
        own.undo(np.arange(50, dtype=np.uint64), steps=1)
    for key in (0, 1, 10_000):
        own.explain(key)
    again = job_of(table).place(restore=str(checkpoint(job, folder, table)))
    train(again, np.random.default_rng(0), range(6, 9))
    shard.stats()
    close(job, again)


warm_up()
before = loaded()
tables = [
    *TABLES.values(),
    *(TableSpec("user", 3, OptimizerSpec(name), Initializer("uniform"), 4) for name in OPTIMIZERS),
    TableSpec("user", 3, blocks=4, admission=Admission("probability", probability=0.5), guard=Guard(undo=3)),
    TableSpec("user", 3, blocks=4, eviction=Eviction(max_bytes=4096)),
    TableSpec("user", 3, blocks=4, eviction=Eviction(max_bytes=4096, order="frequent")),
    TableSpec("user", 3, blocks=4, dtype="int8", memory_bytes=1, eviction=EVERYTHING),
    TableSpec("user", 3, blocks=4, memory_bytes=1, cache=CacheSpec(9)),
]
with tempfile.TemporaryDirectory() as folder:
    for number, table in enumerate(tables):
        use(table, Path(folder) / str(number))
    dense = rig.Job(rig.spec_of(tables=(), dense=tuple(
        DenseSpec(f"w{n}", (5,), OptimizerSpec(name), Initializer(kind))
        for n, (name, kind) in enumerate((o, k) for o in OPTIMIZERS for k in ("normal", "zeros"))
    )), shards=1).place()
    dense.services[0].push(rig.request_of(dense, 0, 0, tables=()))
    dense.dense()
    rig.state(dense)
# Values that come and go packed.
packing = rig.Job(rig.spec_of(), shards=1).place()
for group, codec in enumerate((Codec(codec=1), Codec(codec=2, zstd=True), Codec(codec=3), Codec(codec=4, k=1))):
    request = rig.request_of(packing, 0, group)
    for part in request.tables:
        values = unpack(part.gradients, np.float32, "rows", dims=2)
        form = read_form(codec, values.shape[1], "rows")
        part.packed.CopyFrom(packed(form, encode_rows(form, values), values.size, None))
        part.ClearField("gradients")
    for part in request.dense:
        values = unpack(part.gradients, np.float32, "dense")
        form, lengths = read_form(codec, CHUNK, "dense"), [b.length for b in packing.layout.dense_blocks]
        part.packed.CopyFrom(packed(form, encode_dense(form, values, lengths), values.size, None))
        part.ClearField("gradients")
    assert packing.services[0].push(request).applied == packing.layout.blocks
    if codec.codec != 4:
        keys = [part.keys for part in request.tables]
        blocks = request.dense[0].blocks
        asked = {"codecs": [codec] * 2, "dense_codec": codec}
        packing.services[0].pull(PullRequest(header=packing.header(0), tables=keys, dense=blocks, **asked))
late = {name: n for name, n in loaded().items() if n != before.get(name, 0)}
print(json.dumps({"before": sum(before.values()), "late": late}))
"""


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="nothing is compiled at all")
def test_nothing_is_compiled_or_loaded_after_the_warm_up():
    paths = [str(HERE.parent / "client"), str(HERE)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] > 30
    assert found["late"] == {}
