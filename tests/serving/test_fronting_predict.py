# SPDX-License-Identifier: Apache-2.0
"""Predictions of a model in parts: by a process without rows, for every recipe those of a process that has all of it."""

import threading

import numpy as np
import pytest
from predict_rig import RECIPES, AsShardsHaveIt, Going, Job
from serving_rig import loaded
from threadpoolctl import threadpool_limits

from oarlock.checkpoint.store import open_store
from oarlock.launch.prediction import predictor_of_job
from oarlock.proto.errors import InvalidArgument
from oarlock.serving.follow import Following
from oarlock.serving.fronting import Fronting, FrontingJob
from oarlock.serving.models import Models
from oarlock.serving.part import ModelPart
from oarlock.serving.remote import RemoteModel, RowServers
from oarlock.serving.service import ServingService


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, tmp_path_factory):
    return Job(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def fronting(trained, servers):
    made = Fronting(trained.store, RowServers([each.address for each in servers.parts(trained.store, 3)]))
    made.load()
    yield made
    made.close()
    made.dispose()


@pytest.fixture
def models(trained, fronting):
    made = Models(ServingService(fronting))
    with threadpool_limits(1):
        made.begin(trained.predictor(scorers=2))
        yield made


def first_of(inputs, count):
    return [each._replace(values=each.values.take(np.arange(count)), shape=(count,)) for each in inputs]


def test_they_are_those_of_the_evaluation_and_to_the_bit_of_who_has_the_rows(trained, models):
    alone = Models(ServingService(loaded(trained.store)))
    alone.begin(trained.predictor())
    for inputs in (trained.inputs, first_of(trained.inputs, 1), first_of(trained.inputs, 64)):
        found, right = (each.infer(trained.name, "", inputs, []) for each in (models, alone))
        assert found.outputs[0].values.tobytes() == right.outputs[0].values.tobytes()
        assert found.parameters["missing"] == right.parameters["missing"] >= 0
        assert found.version == right.version
    found = models.infer(trained.name, "", trained.inputs, []).outputs[0].values
    assert len(found) == len(trained.scores) > 500
    assert np.ptp(found) > 0.1
    assert np.abs(found - trained.scores).max() <= 1e-6
    assert models.metadata(trained.name, "") == alone.metadata(trained.name, "")
    assert models.names() == alone.names()


def test_callers_that_are_joined_are_not_told_how_many_keys_have_no_row(trained, models, fronting):
    """For a table it is told for all of them together; their scores are their own."""
    arrays, rows = models.predictor.columns.read({each.name: each for each in first_of(trained.inputs, 40)})
    state = fronting.current
    right = models.predictor.predict(state, arrays, rows)
    assert right.missing is not None
    batcher = models.predictor.batcher
    free, batcher._free = batcher._free, []
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(models.predictor.predict(state, arrays, rows))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    while batcher.waiting < 6 * rows:
        threads[0].join(0.001)
    batcher._free = free
    before = batcher.batches
    models.predictor.predict(state, arrays, rows)
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert batcher.batches - before < 7, "some were joined"
    assert max(np.abs(each.scores - right.scores).max() for each in found) <= 1e-6
    # None of all or, where every key has a row, none of them.
    assert {each.missing for each in found} <= {None, right.missing}


class Parts:
    """A job that is followed in two parts, and in front of them by a process without rows."""

    def __init__(self, trained, folder, servers):
        self.job = Going(trained)
        told = (open_store(folder), self.job.call, lambda: "coordinator", self.job.spec.job)
        self.parts = [Following(*told, part=ModelPart(n, 2), clock=self.job.clock) for n in (0, 1)]
        for each in self.parts:
            each.look()
            self.job.catch_up(each, 200)
        addresses = [servers.serve(each).address for each in self.parts]
        self.front = FrontingJob(*told, RowServers(addresses), dense=True, clock=self.job.clock)
        self.front.look()
        self.catch_up()

    def catch_up(self):
        for each in (*self.parts, self.front):
            self.job.catch_up(each, 200)
        self.front.look()

    def close(self):
        self.front.close()
        self.front.dispose()
        for each in self.parts:
            each.close()


@pytest.fixture
def followed(trained, tmp_path, servers):
    made = Parts(trained, tmp_path, servers)
    with threadpool_limits(1):
        yield made
    made.close()


def test_of_a_job_that_trains_they_are_those_of_its_shards(trained, followed):
    job, front = followed.job, followed.front
    models = Models(ServingService(front))
    models.begin(predictor_of_job(trained.spec, scorers=2))
    found = models.infer(trained.name, "", trained.inputs, [])
    assert np.abs(found.outputs[0].values - trained.scores).max() <= 1e-6
    assert (found.version.run, found.version.live, front.problem) == (job.inner.run, True, "")
    assert (front.live.rows, front.current.rows > 0) == (0, True)
    arrays, rows = models.predictor.columns.read({each.name: each for each in trained.inputs})
    rng = np.random.default_rng(0)
    for _ in range(3):
        job.go_on(rng)
        followed.catch_up()
        before, found = found, models.infer(trained.name, "", trained.inputs, [])
        assert np.abs(found.outputs[0].values - before.outputs[0].values).max() > 1e-3
        right = predictor_of_job(trained.spec).predict(AsShardsHaveIt(job), arrays, rows).scores
        assert found.outputs[0].values.tobytes() == right.tobytes()


def test_answers_of_a_job_are_as_old_as_the_older_of_rows_and_dense_parameters(trained, followed):
    job, front = followed.job, followed.front
    models = Models(ServingService(front))
    models.begin(predictor_of_job(trained.spec))
    assert models.infer(trained.name, "", trained.inputs, []).parameters["seconds_since"] < 10
    # Only the process in front hears of the shards, and then only the parts do.
    for seconds, hears in ((50, [front]), (20, followed.parts)):
        followed.catch_up()
        job.clock.now += seconds
        for each in hears:
            job.catch_up(each)
        front.look()
        assert seconds <= models.infer(trained.name, "", trained.inputs, []).parameters["seconds_since"] < seconds + 10


def test_another_run_takes_the_place_of_one_whole(trained, followed):
    """Rows of a run are asked for with its dense parameters alone, though servers are elsewhere already."""
    job, front = followed.job, followed.front
    models = Models(ServingService(front))
    models.begin(predictor_of_job(trained.spec))
    job.go_on(np.random.default_rng(0))
    followed.catch_up()
    right = models.infer(trained.name, "", trained.inputs, []).outputs[0].values
    assert np.abs(right - trained.scores).max() > 1e-3
    run = job.inner.run
    job.restart(run=run + 1)
    for each in followed.parts:
        assert each.look()
        job.catch_up(each, 200)
        found = models.infer(trained.name, "", trained.inputs, [])
        assert found.version.run == run
        assert found.outputs[0].values.tobytes() == right.tobytes(), "parts have kept the run before"
    assert front.look()
    job.catch_up(front, 200)
    found = models.infer(trained.name, "", trained.inputs, [])
    assert found.version.run == run + 1
    assert np.abs(found.outputs[0].values - trained.scores).max() <= 1e-6


def test_a_run_that_servers_do_not_have_yet_is_the_problem(trained, followed):
    job, front = followed.job, followed.front
    run = job.inner.run
    job.restart(run=run + 1)
    assert front.look()
    job.catch_up(front, 200)
    front.look()
    assert f"the servers of rows serve run {run}, this process has run {run + 1}" in front.problem
    # Nobody gets the model that has no rows of its own.
    assert [type(each) for each in front._served()] == [RemoteModel]
    for each in followed.parts:
        each.look()
        job.catch_up(each, 200)
    front.look()
    assert front.problem == ""


def test_servers_that_serve_cuts_do_not_go_with_a_job(trained, followed, servers):
    addresses = [each.address for each in servers.parts(trained.store, 2)]
    job = followed.job
    told = (open_store(trained.folder), job.call, lambda: "coordinator", job.spec.job)
    front = FrontingJob(*told, RowServers(addresses), clock=job.clock)
    try:
        front.look()
        assert "serve cut" in front.problem
        assert "have them follow the job, too" in front.problem
    finally:
        front.close()
        front.dispose()
    front = Fronting(trained.store, RowServers([servers.serve(each).address for each in followed.parts]))
    try:
        with pytest.raises(InvalidArgument, match=r"follow a job: give --follow JOB"):
            front.load()
    finally:
        front.close()
        front.dispose()
