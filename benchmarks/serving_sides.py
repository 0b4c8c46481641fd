# SPDX-License-Identifier: Apache-2.0
"""The two sides of the serving benchmark: `oarlock serve` with its client, and redis-server with redis-py and hiredis.

Invariant: both are asked from this process, over a Unix socket of this host, for the same keys: uint64[n], and give a new
float32[n, dim]. Redis has the keys' eight bytes as keys and the rows' bytes as values. Each server is ended by ``close``.
"""

import contextlib
import importlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.serving_model import TABLE, row_values
from oarlock.serving import Client

READY_SECONDS = 600.0
_FILL = 100_000


class Side(Protocol):
    """One server and its client."""

    pid: int

    def lookup(self, keys: NDArray[np.uint64]) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


def processor_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process, in user and system, to the nanosecond."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[0])
    return total / 1e9


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has in RAM, pages of mapped files included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} says nothing of its memory")


class Serve:
    """`oarlock serve` of a folder, with ``options``; ``ready``: what it said once it was."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-P", "-m", "oarlock.cli.main", "serve", str(folder), *options, "--json"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        assert self._process.stdout is not None, "made with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"oarlock serve ended with {self._process.wait()}")
        self.ready: dict[str, Any] = json.loads(line)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None, "made with a pipe"
        self._process.stdout.close()


class Oarlock(Serve):
    """`oarlock serve` of a folder, and clients of it, by frames and by gRPC alone."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._client = Client(self.ready["address"], timeout_seconds=60.0)
        self._plain = Client(self.ready["address"], timeout_seconds=60.0, frames=False)

    def lookup(self, keys: NDArray[np.uint64]) -> NDArray[np.float32]:
        return self._client.lookup({TABLE: keys})[TABLE]

    def lookup_by_grpc(self, keys: NDArray[np.uint64]) -> NDArray[np.float32]:
        """The same as single calls of gRPC."""
        return self._plain.lookup({TABLE: keys})[TABLE]

    def close(self) -> None:
        self._client.close()
        self._plain.close()
        super().close()


def missing_of_redis() -> str:
    """Return why Redis cannot be compared with, empty if it can."""
    if shutil.which("redis-server") is None:
        return "redis-server is not installed (Debian: apt-get install redis-server)"
    for name in ("redis", "hiredis"):
        try:
            importlib.import_module(name)
        except ImportError:
            return f"the Python package {name} is not installed (pip install 'oarlock[redis]')"
    return ""


class Redis:
    """redis-server without persistence, at a Unix socket in ``folder``."""

    def __init__(self, folder: Path, dim: int) -> None:
        folder.mkdir(parents=True)
        self._path = str(folder / "redis.sock")
        self._dim = dim
        options = ["--port", "0", "--unixsocket", self._path, "--save", "", "--appendonly", "no", "--dir", str(folder)]
        self._process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        self.pid = self._process.pid
        client = importlib.import_module("redis")
        self._client = client.Redis(unix_socket_path=self._path)
        until = time.monotonic() + READY_SECONDS
        while True:
            try:
                self._client.ping()
                break
            except client.ConnectionError:
                if time.monotonic() > until or self._process.poll() is not None:
                    self.close()
                    raise
                time.sleep(0.01)
        self.version = str(self._client.info("server")["redis_version"])
        self.empty_bytes = resident_bytes(self.pid)

    def fill(self, keys: NDArray[np.uint64]) -> None:
        """Set every key, by the protocol's own bytes: what a client library would add is no part of this."""
        size = 4 * self._dim
        head, middle, tail = b"*3\r\n$3\r\nSET\r\n$8\r\n", f"\r\n${size}\r\n".encode(), b"\r\n"
        kinds = [f"V{len(head)}", "<u8", f"V{len(middle)}", f"V{size}", f"V{len(tail)}"]
        command = np.dtype([(name, kind) for name, kind in zip("hkmvt", kinds, strict=True)])
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._path)
            answers = 5 * len(keys)
            reading = Thread(target=_read, args=(connection, answers))
            reading.start()
            for begin in range(0, len(keys), _FILL):
                some = keys[begin : begin + _FILL]
                out = np.empty(len(some), command)
                out["h"], out["m"], out["t"], out["k"] = head, middle, tail, some
                out["v"] = row_values(some, self._dim).view(f"V{size}")[:, 0]
                connection.sendall(out.tobytes())
            reading.join()
        if self._client.dbsize() != len(keys):
            raise RuntimeError(f"redis has {self._client.dbsize()} keys of {len(keys)}")

    def lookup(self, keys: NDArray[np.uint64]) -> NDArray[np.float32]:
        values = self._client.mget(keys.view("V8").tolist())
        return np.frombuffer(bytearray(b"".join(values)), np.float32).reshape(len(keys), self._dim)

    def close(self) -> None:
        self._client.close()
        self._process.kill()
        self._process.wait()


def _read(connection: socket.socket, size: int) -> None:
    while size:
        size -= len(connection.recv(min(size, 1 << 16)))
