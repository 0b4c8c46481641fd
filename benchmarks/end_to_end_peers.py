# SPDX-License-Identifier: Apache-2.0
"""Other systems on the same work: a folder of scripts, one per system, each with an environment and a harness of its own.

The folder is named by $OARLOCK_PEERS, the environments by $PEERS_VENVS; a script prints a JSON object with ``samples_per_s`` and
``samples_per_cpu_s``. They are run one after the other, not in turns with our windows: what differs between minutes of a busy
machine stands in the ratios. Invariant: no process of a script outlives it by more than the time to kill it. Main thread.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER, ENVIRONMENTS = "OARLOCK_PEERS", "PEERS_VENVS"
PEER_SECONDS = 180.0


@dataclass(frozen=True)
class Peer:
    """A script with its arguments, the case of ours that it is compared with, and by which figure."""

    case: str
    figure: str
    environment: str
    script: str
    arguments: tuple[str, ...]
    # It wants a port that it cannot choose by itself.
    port: bool = False


PEERS = {
    "wdl_ps_vs_rpc_per_cpu_s": Peer(
        "wdl",
        "samples_per_cpu_s",
        "torch",
        "peer_torch_rpc.py",
        ("--model", "wdl", "--threads", "1", "--medium", "--transport", "uv"),
    ),
    "wdl_ps_vs_tf_ps": Peer("wdl", "samples_per_s", "tf", "peer_tf.py", ("--model", "wdl", "--threads", "1", "--ps")),
    "wdl_ps_vs_tf": Peer("wdl", "samples_per_s", "tf", "peer_tf.py", ("--model", "wdl", "--threads", "2")),
    "wdl_ps_vs_paddle": Peer(
        "wdl",
        "samples_per_s",
        "paddle26",
        "peer_paddle_ps.py",
        ("--model", "wdl", "--threads", "1", "--mode", "async"),
        port=True,
    ),
    "ncf_ps_vs_rpc": Peer("ncf", "samples_per_s", "torch", "peer_torch_rpc.py", ("--model", "ncf", "--threads", "1")),
}


def measure_peers(
    ours: Mapping[str, Mapping[str, float] | None], folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys' ratios with what each script printed, and why those that are null are so.

    ours: the figures of the best side of each case, None if none learned. folder: where scripts may put their data.
    """
    found: dict[str, Any] = dict.fromkeys(PEERS)
    printed: dict[str, Any] = {}
    why: dict[str, str] = {}
    for key, peer in PEERS.items():
        mine = ours[peer.case]
        answer = run_peer(peer, folder)
        if isinstance(answer, str):
            why[key] = answer
            continue
        printed[key] = answer
        say(f"{key}: {answer[peer.figure]:,.0f} {peer.figure}")
        if mine is None:
            why[key] = f"no side of {peer.case} learned as it does in process"
        else:
            found[key] = round(mine[peer.figure] / answer[peer.figure], 3)
    return {**found, "peers": printed}, why


def run_peer(peer: Peer, folder: Path) -> dict[str, Any] | str:
    """Return what a script printed, or why there is nothing."""
    scripts, environments = os.environ.get(FOLDER), os.environ.get(ENVIRONMENTS)
    if not scripts or not environments:
        return f"${FOLDER} and ${ENVIRONMENTS} do not name the peers' scripts and environments"
    script, python = Path(scripts) / peer.script, Path(environments) / peer.environment / "bin" / "python"
    for needed in (script, python):
        if not needed.exists():
            return f"{needed.name} of {peer.environment} is not there"
    arguments = [*peer.arguments, *(["--port", str(_free_port())] if peer.port else [])]
    # Its old bundled MKL takes a slow path on AMD processors unless told otherwise.
    hints = {"MKL_DEBUG_CPU_TYPE": "5", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **hints, "PEERS_DATA": os.environ.get("PEERS_DATA", str(folder))}
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONPATH"):
        environment.pop(name, None)
    running = subprocess.Popen(
        [str(python), "-B", str(script), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = running.communicate(timeout=PEER_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        return f"{peer.script} did not end within {PEER_SECONDS:g} s"
    lines = [line for line in out.splitlines() if line.startswith('{"peer"')]
    if not lines:
        last = error.strip().splitlines()[-1:] or ["it printed nothing"]
        return f"{peer.script} failed: {last[0][:200]}"
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
