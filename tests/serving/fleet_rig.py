# SPDX-License-Identifier: Apache-2.0
"""Servers of a model in parts, in this process. Loaded by conftest under the name ``fleet_rig``."""

import asyncio
import contextlib
import threading

import numpy as np
import serving_rig

from oarlock.proto.rpc import GrpcServer
from oarlock.serving import AsyncClient, Client
from oarlock.serving.part import ModelPart
from oarlock.serving.service import ServingService
from oarlock.serving.swap import Serving

SECONDS = 60.0


class Held(ServingService):
    """A service whose look-ups wait while ``go`` is not set; ``asked_for`` counts them."""

    def __init__(self, serving):
        super().__init__(serving)
        self.go = threading.Event()
        self.go.set()
        self.lookups = 0
        self.waiting = threading.Event()
        # While it is not set, nobody is told what is served.
        self.tells = threading.Event()
        self.tells.set()

    def describe(self, request):
        if not self.tells.is_set():
            self.waiting.set()
            self.tells.wait(SECONDS)
        return super().describe(request)

    def lookup(self, request):
        self.lookups += 1
        if not self.go.is_set():
            self.waiting.set()
            self.go.wait(SECONDS)
        return super().lookup(request)


class Server:
    """One server of what ``serving`` serves."""

    def __init__(self, serving, listen="127.0.0.1:0", tells=True, **options):
        self.serving = serving
        self.service = Held(self.serving)
        if not tells:
            self.service.tells.clear()
        self.server = GrpcServer(self.service, "Serving", listen=listen, serving=lambda: self.serving.ready, **options)
        self.address = self.server.start()

    def stop(self):
        self.service.go.set()
        self.service.tells.set()
        self.server.stop()


class Servers:
    """Servers that are stopped at the end."""

    def __init__(self):
        self._all = []

    def start(self, store, number=0, parts=1, recall=(), **options):
        """Return a server of part ``number`` of ``parts`` of what ``store`` has."""
        serving = Serving(store, part=ModelPart(number, parts), recall=recall)
        serving.load()
        return self.serve(serving, **options)

    def serve(self, serving, **options):
        self._all.append(Server(serving, **options))
        return self._all[-1]

    def parts(self, store, parts, replicas=1, **options):
        """Return servers of all parts, part after part."""
        return [self.start(store, part, parts, **options) for part in range(parts) for _ in range(replicas)]

    def stop(self):
        for each in self._all:
            each.stop()


class Asked:
    """A client of either kind with blocking calls."""

    def __init__(self, kind, addresses, **options):
        self._loop = asyncio.Runner() if kind == "asyncio" else None
        options.setdefault("timeout_seconds", SECONDS)
        self.client = Client(addresses, **options) if self._loop is None else AsyncClient(addresses, **options)
        self.counts = self.client.counts

    def __getattr__(self, name):
        call = getattr(self.client, name)
        return call if self._loop is None else lambda *given, **named: self._loop.run(call(*given, **named))

    def go_on(self):
        """Have done for a moment what the client does beside calls."""
        if self._loop is None:
            threading.Event().wait(0.01)
        else:
            self._loop.run(asyncio.sleep(0.01))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.ExitStack() as stack:
            if self._loop is not None:
                stack.callback(self._loop.close)
                self._loop.run(self.client.close())
            else:
                self.client.close()


def check(found, model, keys, cut):
    """Raise unless rows of both tables are those of keys at a cut."""
    for table, dim in (("user", 4), ("item", 16)):
        assert found[table].shape == (len(keys), dim)
        there = np.isin(keys, model.keys)
        assert (found[table][there] == serving_rig.value_of(cut, keys[there])[:, None]).all()
        assert found.missing[table] == int((~there).sum())
    assert (found.version.cut, found.version.live) == (cut, False)


def both(keys):
    return {"user": keys, "item": keys}
