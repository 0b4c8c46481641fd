# SPDX-License-Identifier: Apache-2.0
"""`oarlock tokens FILE`: make the secrets of a job. They are never printed."""

import argparse
import os
from pathlib import Path

from oarlock.proto.errors import InvalidArgument
from oarlock.proto.tokens import new_tokens


def tokens(options: argparse.Namespace) -> int:
    """Write a file that only its owner may read, with a new token for each role; one that is there stays as it is."""
    path = Path(options.file)
    try:
        # Nobody else may read it even while it is written.
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InvalidArgument(
            f"{path} is there already: tokens that are in use are not replaced; give another name"
        ) from None
    with os.fdopen(opened, "w", encoding="ascii") as file:
        file.write(new_tokens())
    print(path)
    return 0
