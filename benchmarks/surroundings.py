# SPDX-License-Identifier: Apache-2.0
"""What a measurement depends on beside the code: machine, versions, threads and the BLAS library's settings.

Invariant: after ``settle()`` matrix products of this process and its children run on one thread each, with the kernels that
the library itself chooses for the CPU. Main thread, before numpy is imported.
"""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

# Ties OpenBLAS to the kernels of one CPU type, often not those of the machine at hand.
CORE_TYPE = "OPENBLAS_CORETYPE"
_WAS = "OARLOCK_BENCHMARK_CORETYPE"
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def settle(module: str) -> None:
    """Start ``module`` anew with the wanted environment, unless this process has it; BLAS reads it as it is loaded."""
    wanted = {**os.environ, **_ONE_THREAD}
    if was := wanted.pop(CORE_TYPE, None):
        wanted[_WAS] = was
        print(f"{CORE_TYPE}={was} is left out of this measurement", file=sys.stderr, flush=True)
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-P", "-m", module, *sys.argv[1:]], wanted)


def surroundings(packages: tuple[str, ...]) -> dict[str, Any]:
    """Return what to report beside the figures."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "versions": {"python": sys.version.split()[0], **{p: _version(p) for p in packages}},
        "openblas_coretype": {"found": os.environ.get(_WAS), "used": os.environ.get(CORE_TYPE)},
        "openblas_settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("OPENBLAS_")},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
