# SPDX-License-Identifier: Apache-2.0
"""Print the status of the coordinator at an address, line by line, until standard input closes. A program of its own: it runs on
the coordinator's host, where no link is between them."""

import argparse
import asyncio
import os
import sys
import threading

from oarlock.client.security import security_of
from oarlock.proto.coordinator_pb2 import StatusRequest
from oarlock.proto.errors import PSError
from oarlock.proto.rpc import GrpcTransport

PAUSE_SECONDS = 0.05


async def watch(address: str) -> None:
    transport = GrpcTransport(security=security_of(argparse.Namespace()))
    while True:
        try:
            reply = await transport.call(address, "Coordinator.Status", StatusRequest(), timeout_seconds=2.0)
            sys.stdout.write(reply.status + "\n")
            sys.stdout.flush()
        except PSError:
            # It is not up yet, or over.
            pass
        await asyncio.sleep(PAUSE_SECONDS)


def end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    asyncio.run(watch(sys.argv[1]))
