# SPDX-License-Identifier: Apache-2.0
"""A coordinator gets its address back: a port that somebody else has for a while, a socket whose file the dead left."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oarlock.cluster import __main__ as entry
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.rpc import GrpcServer


class Nobody:
    """A service that is never asked."""


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield held


def server_at(held: socket.socket) -> GrpcServer:
    return GrpcServer(Nobody(), "Coordinator", listen=f"127.0.0.1:{held.getsockname()[1]}", threads=1)


def test_a_port_that_is_taken_is_waited_for(taken: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "LISTEN_PAUSE_SECONDS", 0.01)
    server = server_at(taken)
    port = taken.getsockname()[1]
    tries: list[str] = []

    def note(*arguments: Any) -> None:
        tries.append("taken")
        if len(tries) == 3:
            taken.close()

    monkeypatch.setattr(entry.logger, "info", note)
    try:
        assert asyncio.run(entry.started(server, 60.0)) == f"127.0.0.1:{port}"
    finally:
        server.stop()
    assert tries == ["taken"] * 3


@pytest.mark.parametrize(("seconds", "words"), [(0.0, "malformed$"), (0.05, r"\(waited 0.05 s for it\)$")])
def test_it_is_not_waited_for_without_end(
    taken: socket.socket, monkeypatch: pytest.MonkeyPatch, seconds: float, words: str
) -> None:
    monkeypatch.setattr(entry, "LISTEN_PAUSE_SECONDS", 0.01)
    with pytest.raises(InvalidArgument, match=f"cannot listen on 127.0.0.1:.*{words}"):
        asyncio.run(entry.started(server_at(taken), seconds))


@pytest.mark.slow
def test_a_socket_that_a_dead_coordinator_left_is_taken_over(start: Any, tmp_path: Path) -> None:
    _, folder = start()
    address = f"unix:{tmp_path / 'c.sock'}"
    command = [sys.executable, "-P", "-m", "oarlock.cluster", "--dir", str(folder), "--listen", address]
    for life in (1, 2):
        with (tmp_path / "err").open("ab") as err:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=err)
        try:
            told: dict[str, Any] = {}
            while told.get("pid") != process.pid:
                assert process.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.02)
                if (folder / "coordinator.json").exists():
                    told = json.loads((folder / "coordinator.json").read_text())
            assert told["address"] == address
        finally:
            process.send_signal(signal.SIGKILL if life == 1 else signal.SIGTERM)
            code = process.wait(60)
    assert code == 0
