# SPDX-License-Identifier: Apache-2.0
"""The benchmark of look-ups over TLS comes to its end, leaves nothing behind, and goes by TCP where it says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oarlock.benchmarks.by_tcp import as_from_another_machine
from oarlock.benchmarks.serving_tls import BY, SIZES_OF_REQUESTS
from oarlock.proto.rpc import sockets


@pytest.mark.slow
def test_it_comes_to_its_end(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "oarlock.benchmarks.serving_tls", "--tiny", "--json"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == [], "something was left behind"
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["failed"] == 0
    sizes = {str(n) for n in SIZES_OF_REQUESTS}
    for name in ("tls_vs_none", "tls_vs_none_rows_per_second"):
        assert set(result[name]) == set(BY)
        assert all(set(each) == sizes and min(each.values()) > 0 for each in result[name].values())
    assert set(result["frames_vs_grpc_tls"]) == sizes


def test_sockets_of_this_machine_are_left_alone_for_a_while() -> None:
    connect = sockets.connect
    with as_from_another_machine(), pytest.raises(ConnectionRefusedError):
        sockets.connect(sockets.ABSTRACT + "any", "127.0.0.1:1")
    assert sockets.connect is connect
