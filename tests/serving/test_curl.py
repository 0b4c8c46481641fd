# SPDX-License-Identifier: Apache-2.0
"""The lines of docs/serving.md that ask by curl, asked of a process that serves over HTTP."""

import http.client
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predict_rig import Job

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
LINES = [shlex.split(line) for line in re.findall(r"^curl .*$", TEXT, re.MULTILINE)]
PLACE = "127.0.0.1:8501"
SECONDS = 120.0


def asked(words: list[str], address: str) -> Any:
    """Return the JSON that a line gets; by http.client where there is no curl."""
    words = [word.replace(PLACE, address) for word in words]
    if shutil.which("curl"):
        command = [words[0], "--silent", "--show-error", "--fail-with-body", "--max-time", "60", *words[1:]]
        return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=SECONDS).stdout)
    body = words[words.index("-d") + 1] if "-d" in words else None
    connection = http.client.HTTPConnection(address, timeout=SECONDS)
    try:
        connection.request("POST" if body else "GET", words[-1].partition(address)[2], body)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@pytest.mark.slow
def test_the_lines_get_what_they_are_for(tmp_path: Path) -> None:
    job = Job("dlrm", tmp_path)
    command = [
        sys.executable,
        "-P",
        "-m",
        "oarlock.cli.main",
        "serve",
        str(job.folder),
        "--http",
        "127.0.0.1:0",
        "--metrics-port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
            found = re.search(r"HTTP at http://(\S+)/v2", lines[0])
            assert found, lines
            assert lines[1].startswith("ready: ")
            assert lines[1].strip().endswith("; predictions of dlrm")
            answers = [asked(words, found[1]) for words in LINES]
            assert len(answers) == 4
            assert answers[0]["inputs"] == [{"name": "keys", "datatype": "UINT64", "shape": [-1]}]
            assert answers[1]["outputs"][0]["shape"] == [2, 8]
            assert [each["name"] for each in answers[2]["inputs"]] == ["age", "spent", "city", "item"]
            assert answers[3]["outputs"][0]["shape"] == [2]
            assert all(0 < score < 1 for score in answers[3]["outputs"][0]["data"])
            # A prediction in the same way, which is training's.
            first = {"age": "FP32", "spent": "FP32", "city": "BYTES", "item": "BYTES"}
            texts = {tensor.name: tensor.values[0].as_py().decode() for tensor in job.inputs}
            inputs = [
                {"name": n, "datatype": t, "shape": [1], "data": [float(texts[n]) if t == "FP32" else texts[n]]}
                for n, t in first.items()
            ]
            line = ["curl", "-d", json.dumps({"inputs": inputs}), f"http://{PLACE}/v2/models/dlrm/infer"]
            answer = asked(line, found[1])
            place = re.search(r"metrics at http://(\S+)/metrics", lines[0])
            assert place
            connection = http.client.HTTPConnection(place[1], timeout=SECONDS)
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()
            connection.close()
            assert 'oarlock_serving_http_responses_total{status="200"} 5' in page
            assert "oarlock_serving_predicted_samples_total 3" in page
            assert abs(np.float32(answer["outputs"][0]["data"][0]) - job.scores[0]) <= 1e-6
        finally:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
        assert "rows alone" not in said
