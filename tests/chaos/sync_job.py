# SPDX-License-Identifier: Apache-2.0
"""A small sync job of four ranks, and the digest of what it came to."""

from pathlib import Path
from typing import Any

from oarlock.checkpoint.store import open_checkpoint
from oarlock.cli.digest import digest_of
from oarlock.launch.config import RunConfig


def config(data: Path, **changes: Any) -> RunConfig:
    values = {
        "data": str(data),
        "mode": "sync",
        "ranks": 4,
        "epochs": 5,
        "seed": 3,
        "lease_seconds": 2.0,
        "heartbeat_seconds": 0.2,
        "recipe_options": {"batch_samples": 1024},
        **changes,
    }
    return RunConfig(**values)


def digest(folder: Path) -> str:
    return str(digest_of(*open_checkpoint(folder / "checkpoints")))
