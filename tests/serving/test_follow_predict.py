# SPDX-License-Identifier: Apache-2.0
"""Predictions of a job that is followed: of every recipe those of training's evaluation at the same state, while it goes on."""

import threading

import numpy as np
import pytest
from predict_rig import RECIPES, AsShardsHaveIt, Going
from predict_rig import Job as Trained
from threadpoolctl import threadpool_limits

from oarlock.launch.prediction import predictor_of_job
from oarlock.proto.errors import Unavailable
from oarlock.proto.inference_pb2 import ModelInferRequest, ModelMetadataRequest, ServerReadyRequest
from oarlock.serving.inference import InferenceService
from oarlock.serving.models import Models
from oarlock.serving.service import ServingService


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, tmp_path_factory):
    return Trained(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def going(trained, tmp_path):
    job = Going(trained)
    following = job.follower(tmp_path, dense=True)
    models = Models(ServingService(following))
    predictor = predictor_of_job(trained.spec, scorers=2)
    with threadpool_limits(1):
        job.catch_up(following, 200)
        models.begin(predictor)
        yield job, following, models
    following.close()


def scores(models, job, inputs):
    return models.infer(job.trained.name, "", inputs, []).outputs[0].values


def test_they_are_those_of_the_evaluation_and_then_of_the_shards(going):
    job, following, models = going
    inputs = job.trained.inputs
    found = scores(models, job, inputs)
    assert len(found) == len(job.trained.scores) > 500
    assert np.ptp(found) > 0.1
    assert np.abs(found - job.trained.scores).max() <= 1e-6
    print(job.trained.name, "equal:", (found == job.trained.scores).mean())
    rng = np.random.default_rng(0)
    arrays, rows = models.predictor.columns.read({each.name: each for each in inputs})
    for _ in range(3):
        job.go_on(rng)
        job.catch_up(following)
        before, found = found, scores(models, job, inputs)
        assert np.abs(found - before).max() > 1e-3
        # The same samples in the same batches, by a predictor that knows of nothing else: to the bit.
        alone = predictor_of_job(job.trained.spec)
        want = alone.predict(AsShardsHaveIt(job), arrays, rows).scores
        assert found.tobytes() == want.tobytes()


def test_the_version_is_of_the_run_and_goes_forward(going):
    job, following, models = going
    inputs = job.trained.inputs
    answer = models.infer(job.trained.name, "", inputs, [])
    run = job.inner.run
    assert (answer.version.run, answer.version.cut) == (run, 0)
    assert answer.parameters["seconds_since"] < 3
    assert answer.parameters["missing"] >= 0
    job.status["checkpoints"] = [{"cut": 7}]
    following.look()
    job.clock.now += 5
    answer = models.infer(job.trained.name, f"{run}.7", inputs, [])
    assert answer.parameters["seconds_since"] >= 5
    assert models.metadata(job.trained.name, "").version == f"{run}.7"
    inference = InferenceService(models)
    assert inference.server_ready(ServerReadyRequest()).ready
    assert inference.model_metadata(ModelMetadataRequest(name=job.trained.name)).versions == [f"{run}.7"]
    empty = ModelInferRequest(model_name=job.trained.name)
    for each in inputs:
        empty.inputs.add(name=each.name, datatype=each.datatype, shape=[0])
    reply = inference.model_infer(empty)
    assert reply.model_version == f"{run}.7"
    assert reply.parameters["run"].int64_param == run


def test_who_asks_while_it_goes_on_gets_scores_of_one_run(trained, going, tmp_path):
    """Values of two runs differ so much that a mix would show: of one run all are zero."""
    job, following, models = going
    inputs = [each._replace(values=each.values.take(np.arange(64)), shape=(64,)) for each in trained.inputs]
    over, found, wrong = threading.Event(), {}, []

    def ask():
        while not over.is_set():
            try:
                answer = models.infer(trained.name, "", inputs, [])
            except Unavailable:
                # A new run that is not all here yet.
                continue
            values = answer.outputs[0].values
            if not np.isfinite(values).all():
                wrong.append(values)
            found.setdefault(answer.version.run, []).append(values)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(0)
    try:
        for _ in range(10):
            job.go_on(rng)
            job.catch_up(following)
        run = job.inner.run
        last = scores(models, job, inputs)
        job.restart(run=run + 1)
        assert following.look()
        job.catch_up(following, 200)
        while len(found.get(run + 1, ())) < 10:
            threads[0].join(0.01)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len({values.tobytes() for values in found[run]}) > 3
    # The new run is as the job was when it had been trained, and was nothing else.
    assert all(np.abs(values - trained.scores[:64]).max() <= 1e-6 for values in found[run + 1])
    assert np.abs(last - trained.scores[:64]).max() > 1e-3
