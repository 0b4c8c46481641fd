# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks [--quick] [--json]`: every benchmark of speed, one after the other, each in a process of its own.

`quality` and `simulate`, which take hours, are left to who wants them.
"""

import subprocess
import sys

MODULES = (
    "rpc",
    "wire",
    "security",
    "table",
    "compress",
    "cache",
    "cache_job",
    "staleness",
    "dense",
    "ncf",
    "end_to_end",
    "overload",
    "exactly_once",
    "kills",
    "chaos",
    "checkpoint",
    "elasticity",
    "scaling",
    "serving",
    "serving_faults",
    "serving_tls",
)


def main() -> int:
    """Run all; return 0 if all came to their end."""
    codes = [
        subprocess.run(
            [sys.executable, "-P", "-m", f"oarlock.benchmarks.{name}", *sys.argv[1:]], check=False
        ).returncode
        for name in MODULES
    ]
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
