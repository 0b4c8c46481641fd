# SPDX-License-Identifier: Apache-2.0
"""A model in parts as people run it: two parts with a replica each, and in front of them a process that predicts over HTTP."""

import contextlib
import json
import re
import time
import urllib.request

import numpy as np
import pytest
import serving_rig
from predict_rig import Job
from process_rig import Process

from oarlock.cli.main import main
from oarlock.serving import Client

pytestmark = pytest.mark.slow
SECONDS = 60.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Job("wide_deep", tmp_path_factory.mktemp("job"))


def predicted(http, inputs, rows):
    """Return scores over HTTP, by JSON, and the answer's version."""
    told = [
        {
            "name": each.name,
            "shape": [rows],
            "datatype": "BYTES",
            "data": [v.as_py().decode() for v in each.values[:rows]],
        }
        for each in inputs
    ]
    request = urllib.request.Request(
        f"http://{http}/v2/models/wide_deep/infer",
        json.dumps({"inputs": told}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        answer = json.loads(reply.read())
    return np.array(answer["outputs"][0]["data"], np.float32), answer["model_version"]


@contextlib.contextmanager
def parts_of(folder, *numbers):
    """Processes of parts of two; and the options by which they are asked for rows."""
    found = [Process(folder, "--follow-cuts", "--part", f"{n}/2") for n in numbers]
    try:
        yield found, [option for each in found for option in ("--rows-at", each.address)]
    finally:
        for each in found:
            each.process.kill()
            each.process.communicate()


def test_a_model_in_parts_predicts_over_http_and_goes_on_without_half_of_its_servers(trained, capsys):
    folder = trained.folder
    with (
        parts_of(folder, 0, 1, 0, 1) as (parts, rows_at),
        Process(folder, *rows_at, "--http", "127.0.0.1:0", "--metrics-port", 0) as front,
    ):
        assert "predictions of wide_deep" in front.lines[-1]
        http = re.search(r"HTTP at http://(\S+)/v2", front.lines[0])[1]
        scores, version = predicted(http, trained.inputs, 300)
        assert np.abs(scores - trained.scores[:300]).max() <= 1e-6
        assert version == f"{trained.manifest.run}.{trained.manifest.cut}"
        for each in parts[2:]:
            each.process.kill()
        for _ in range(30):
            again, _ = predicted(http, trained.inputs, 300)
            assert np.abs(again - scores).max() <= 1e-6
        metrics = re.search(r"metrics at (http://[^,\s]+)", front.lines[0])[1]
        page = urllib.request.urlopen(metrics, timeout=SECONDS).read().decode()
        assert re.search(r"^oarlock_serving_failovers_total [0-9]", page, re.M)
        code, said = front.end()
        assert code == 0
        assert not re.search("Traceback|[Ee]rror", said), said


def test_it_goes_where_its_servers_go(model, capsys):
    with parts_of(model.folder, 0, 1) as (parts, rows_at), Process(model.folder, *rows_at) as front:
        assert front.lines[-1].startswith("ready: cut 1 of run 0, 2 tables, 400 rows")
        with Client(front.address, timeout_seconds=SECONDS) as client:

            def go_to(cut):
                deadline = time.monotonic() + SECONDS
                while client.lookup({"user": model.keys}).version.cut != cut:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                found = client.lookup({"user": model.keys})
                assert (found["user"] == serving_rig.value_of(cut, model.keys)[:, None]).all()

            go_to(1)
            model.cut(2)
            go_to(2)
            assert main(["serve", "rollback", front.address]) == 1
            assert "roll those back" in capsys.readouterr().err
            assert main(["serve", "rollback", *(each.address for each in parts)]) == 0
            go_to(1)
            assert main(["serve", "rollback", "--newest", *(each.address for each in parts)]) == 0
            go_to(2)
        code, said = front.end()
        assert code == 0
        assert not re.search("Traceback|[Ee]rror", said), said


def test_what_does_not_go_together_is_said_in_one_line(trained, capsys):
    folder = str(trained.folder)
    for options, words in (
        (["--rows-at", "nowhere"], "'nowhere' is no address"),
        (["--rows-at", "127.0.0.1:1", "--part", "0/2"], "--part does not go with --rows-at"),
        (["--rows-at", "127.0.0.1:1", "--recall", "fields"], "--recall does not go with --rows-at"),
        (["--rows-at", "127.0.0.1:1", "--follow-cuts"], "--follow-cuts does not go with --rows-at"),
    ):
        assert main(["serve", folder, *options]) == 1
        assert words in capsys.readouterr().err
    cut = trained.manifest.cut
    assert main(["serve", f"{folder}@{cut}", "--rows-at", "127.0.0.1:1"]) == 1
    assert f"@{cut} does not go with --rows-at" in capsys.readouterr().err
