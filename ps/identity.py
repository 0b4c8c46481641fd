# SPDX-License-Identifier: Apache-2.0
"""Identity: whom a message is from and for; what does not fit is refused by name.

Invariant: nothing of a message is looked at before its header passed.
"""

from dataclasses import dataclass

from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import WrongIncarnation, WrongJob, WrongRun
from oarlock.proto.version import check_protocol


@dataclass(frozen=True)
class Identity:
    """Who this shard is, since it joined."""

    job: bytes
    run: int
    id: int
    incarnation: int

    def check(self, header: Header) -> None:
        """Raise what names the first part of ``header`` that does not fit."""
        check_protocol(header.protocol)
        if header.job != self.job:
            raise WrongJob(
                f"this shard serves job {self.job.hex()}, the message is of job {header.job[:16].hex() or 'none'}"
            )
        if header.run != self.run:
            raise WrongRun(
                f"this shard is in run {self.run}, the message is of run {header.run}: join anew", run=self.run
            )
        if header.target != self.incarnation:
            raise WrongIncarnation(
                f"the message is for incarnation {header.target}, this shard is {self.incarnation}: fetch the placement",
                shard=self.id,
            )
