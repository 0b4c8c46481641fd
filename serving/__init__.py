# SPDX-License-Identifier: Apache-2.0
"""Serving: rows of a checkpoint by key, from a read-only process, and the clients that ask it.

Reading order: snapshot (a cut, opened), swap (which one is served), service, process; client.
"""

from oarlock.proto.security import Security, SecuritySpec
from oarlock.serving.client import AsyncClient, Client, Found, ModelVersion

__all__ = ["AsyncClient", "Client", "Found", "ModelVersion", "Security", "SecuritySpec"]
