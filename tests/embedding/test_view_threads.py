# SPDX-License-Identifier: Apache-2.0
"""Threads that push, pull and sweep while another reads views: none sees half a row, or one of another time."""

import functools
import threading
from unittest import mock

import embedding_reference as reference
import numpy as np
import pytest
import table_reference
import view_rig

from oarlock.embedding import cold, view
from oarlock.embedding.spec import Eviction, Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.spill_file import SpillFile

DIM = 8
KEYS = 400 if reference.JIT else 60
CUTS = 12 if reference.JIT else 4


def small_segments(folder, width, slack):
    return SpillFile(folder, width, limit_bytes=1 << 26, segment_bytes=64 * (-(-width // 8) * 8 + 8), slack=slack)


@pytest.mark.parametrize("kind", ["memory", "spill"])
def test_views_are_of_one_instant_while_others_push_pull_and_sweep(kind, tmp_path):
    spill = kind == "spill"
    spec = TableSpec(
        "t",
        DIM,
        OptimizerSpec("momentum"),
        Initializer("zeros"),
        4,
        eviction=Eviction(age=40),
        memory_bytes=1 if spill else 0,
    )
    patches = [mock.patch.object(view, "SLICE", 16)]
    patches += [
        mock.patch.object(cold, "LEAST_ROWS", KEYS // 20),
        mock.patch.object(cold, "TIDY_RECORDS", 16),
        mock.patch.object(cold, "SpillFile", small_segments),
    ]
    for patch in patches:
        patch.start()
    try:
        table = table_reference.stored(spec, folder=tmp_path)
        alone = threading.Lock()  # of who changes keys' content; a view begins between two of them
        step = [1]

        def push(seed, turn):
            rng = np.random.default_rng([seed, turn])
            keys = rng.choice(KEYS, KEYS // 8, replace=False) if turn % 3 else np.arange(KEYS // 10)
            gradients = np.repeat(rng.normal(size=(len(keys), 1)).astype(np.float32), DIM, axis=1)
            with alone:
                step[0] += 1
                table_reference.push(table, keys, gradients, step=step[0])

        def pull(turn):
            rows = table_reference.pull(table, np.random.default_rng(turn).choice(KEYS, 50))[0]
            assert (rows == rows[:, :1]).all()

        def sweep(turn):
            with alone:
                table.sweep(turn % 4, tick=step[0], buckets=3)

        calls = [functools.partial(push, seed) for seed in range(2)] + [pull, sweep]
        disk, gone = None, 0
        push(0, 0)
        with InTheBackground(calls):
            for number in range(CUTS):
                with alone:
                    if number % 4 == 2:  # all rows of a block leave
                        step[0] += 50
                        while not table.sweep(0, tick=step[0])[1]:
                            pass
                    before = {block: view_rig.as_dict(table.export_block(block)) for block in range(4)}
                    cut = table.begin_view(number)
                for block in range(4):
                    rows = cut.content(block)
                    assert (rows.weights == rows.weights[:, :1]).all()
                    assert view_rig.as_dict(rows) == before[block]
                    if disk is not None:
                        changes = cut.changes(block)
                        gone += len(changes.gone)
                        assert view_rig.merged(disk[block], changes) == before[block]
                if number % 3 != 1:
                    assert table.commit_view(number)
                    disk = before
                    cut.close()
        assert not table.descriptors[:, :2].any()  # all locks are free
        assert gone > 0
        if spill:
            assert table._cold.file.counts.records_read > 0
        table.close()
    finally:
        for patch in patches:
            patch.stop()


class InTheBackground:
    """Repeat calls in threads of their own until the block ends; raise what went wrong in them."""

    def __init__(self, calls):
        self.stop, self.errors = threading.Event(), []
        self.threads = [threading.Thread(target=self.run, args=(call,)) for call in calls]

    def run(self, call):
        turn = 0
        try:
            with np.errstate(over="ignore"):
                while not self.stop.is_set():
                    call(turn)
                    turn += 1
        except Exception as error:
            self.errors.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        assert self.errors == []
