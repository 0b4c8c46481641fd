# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.telemetry docs/metrics.md`: write the reference part of the page anew."""

import sys
from pathlib import Path

from oarlock.telemetry.document import rewritten

if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
