# SPDX-License-Identifier: Apache-2.0
"""Predictions of a checkpoint are the scores of training's own evaluation, for every recipe that there is."""

import copy
import threading
from typing import Any

import numpy as np
import pytest
from predict_rig import RECIPES, Job
from serving_rig import loaded
from threadpoolctl import threadpool_limits

from oarlock.serving.models import Models
from oarlock.serving.service import ServingService
from oarlock.serving.tensors import Tensor


@pytest.fixture(scope="module", params=RECIPES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def models(job: Job) -> Any:
    made = Models(ServingService(loaded(job.store)))
    with threadpool_limits(1):
        made.begin(job.predictor(scorers=2))
        yield made


def scores(models: Models, job: Job, inputs: list[Tensor]) -> Any:
    return models.infer(job.name, "", inputs, []).outputs[0].values


def rows_of(inputs: list[Tensor], run: slice) -> list[Tensor]:
    where = np.arange(run.start, run.stop)
    return [each._replace(values=each.values.take(where), shape=(len(where),)) for each in inputs]


def test_they_are_those_of_the_evaluation(models: Models, job: Job) -> None:
    found = scores(models, job, job.inputs)
    assert len(found) == len(job.scores) > 500
    assert np.ptp(found) > 0.1, "a model that has learnt nothing shows nothing"
    assert np.abs(found - job.scores).max() <= 1e-6
    print(job.name, "equal:", (found == job.scores).mean(), "most:", np.abs(found - job.scores).max())


def test_a_row_has_the_same_score_in_any_company(models: Models, job: Job) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 7, 64, 300):
        begin = int(rng.integers(0, len(job.scores) - size))
        run = slice(begin, begin + size)
        found = scores(models, job, rows_of(job.inputs, run))
        print(size, (found == job.scores[run]).mean())
        assert np.abs(found - job.scores[run]).max() <= 1e-6


def test_each_batch_is_of_one_state_rows_and_dense_parameters(models: Models, job: Job) -> None:
    assert models.predictor is not None
    predictor, first = models.predictor, models._service.serving.current
    arrays, rows = predictor.columns.read({each.name: each for each in rows_of(job.inputs, slice(0, 40))})
    other = copy.copy(first)
    other.dense = first.dense * np.float32(0.5)
    right = {id(state): predictor.predict(state, arrays, rows).scores for state in (first, other)}
    assert np.abs(right[id(first)] - right[id(other)]).max() > 1e-3
    wrong: list[float] = []

    def ask(seed: int) -> None:
        # All begin with the same state, so that some are joined.
        for draw in [0.0, *np.random.default_rng(seed).random(100)]:
            state = first if draw < 0.5 else other
            found = predictor.predict(state, arrays, rows).scores
            wrong.extend(np.abs(found - right[id(state)])[np.abs(found - right[id(state)]) > 1e-6])

    batcher, before = predictor.batcher, predictor.batcher.batches
    # Nobody computes until all six wait.
    free, batcher._free = batcher._free, []
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    while batcher.waiting < 6 * 40:
        threads[0].join(0.001)
    batcher._free = free
    predictor.predict(other, arrays, rows)
    for thread in threads:
        thread.join()
    assert not wrong
    assert batcher.batches - before < 6 * 101 + 1, "some were joined"
