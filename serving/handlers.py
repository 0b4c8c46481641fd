# SPDX-License-Identifier: Apache-2.0
"""Several services behind one server: each method is answered by whoever has it.

Invariant: no two have a method of one name. Any thread.
"""

from typing import Any


class Handlers:
    """Has what ``services`` have."""

    def __init__(self, *services: object) -> None:
        self._services = services

    def __getattr__(self, name: str) -> Any:
        for service in self._services:
            if hasattr(service, name):
                return getattr(service, name)
        raise AttributeError(name)
