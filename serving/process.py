# SPDX-License-Identifier: Apache-2.0
"""The life of a serving process: listen, open the model, say that it is ready, serve until a signal, drain.

Invariant: it listens from before the model is open, and answers what it can: its health is NOT_SERVING, a look-up Unavailable.
Kernels are compiled before it is ready. At SIGTERM or SIGINT health says NOT_SERVING, what is under way is answered, and the
process ends with 0, also while it opens the model; a second signal ends it at once. The main thread, since signals come there.
"""

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event
from types import FrameType

from oarlock.checkpoint.reading import Reading
from oarlock.client.entry import keep_what_is_loaded
from oarlock.client.processors import limit_blas
from oarlock.client.telemetry import observed, server_source
from oarlock.embedding.fresh import warm_up as warm_up_fresh
from oarlock.embedding.frozen import warm_up
from oarlock.embedding.partition import warm_up as warm_up_parts
from oarlock.proto.rpc import GrpcServer
from oarlock.proto.security import Security
from oarlock.proto.work import REQUEST_MEMORY_BYTES
from oarlock.serving.handlers import Handlers
from oarlock.serving.http_server import HttpServer
from oarlock.serving.inference import InferenceService
from oarlock.serving.models import Models
from oarlock.serving.openapi import description
from oarlock.serving.part import WHOLE, ModelPart
from oarlock.serving.predictor import Predictor
from oarlock.serving.recall import RecallSpec
from oarlock.serving.rest import Rest
from oarlock.serving.service import MAX_KEYS, ServingService
from oarlock.serving.snapshot import Model, Progress
from oarlock.serving.swap import Serving
from oarlock.serving.telemetry import http_source, prediction_source, serving_source
from oarlock.telemetry.prometheus import LOOPBACK

logger = logging.getLogger(__name__)

THREADS = 256
# How long one thread may keep the interpreter from another that waits for it; see ps/process.py.
SWITCH_SECONDS = 0.0002
# How long calls under way may take once the process is to end.
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What a serving process is told.

    Behaviour: ``cut`` (None: the newest), ``follow_cuts``: take newer ones as they come; ``trust``: compute no checksums;
    ``drain_seconds``: how long it answers on after a signal, with a health of NOT_SERVING, so that callers go elsewhere.
    ``http``: where the Open Inference Protocol is spoken over HTTP, too; empty: nowhere.
    ``recall``: of which tables the nearest rows may be asked for.
    ``part``: of the model, which this process serves.
    Performance: ``threads``: calls and connections at once.
    """

    listen: str = "127.0.0.1:0"
    http: str = ""
    cut: int | None = None
    follow_cuts: bool = False
    trust: bool = False
    drain_seconds: float = 0.0
    max_keys: int = MAX_KEYS
    metrics_port: int | None = None
    metrics_host: str = LOOPBACK
    threads: int = THREADS
    request_memory_bytes: int = REQUEST_MEMORY_BYTES
    recall: tuple[RecallSpec, ...] = ()
    part: ModelPart = WHOLE


def run(
    store: Reading,
    settings: Settings,
    *,
    security: Security | None = None,
    predicts: Callable[[Model], Predictor | None] = lambda model: None,
    listening: Callable[[str, str, str], object] = lambda address, metrics, http: None,
    progress: Progress = lambda done, total: None,
    ready: Callable[[Serving], object] = lambda serving: None,
    serving: Serving | None = None,
) -> None:
    """Serve until a signal. ``listening`` hears of the addresses of the service, its metrics and HTTP, ``ready`` of the model.

    ``predicts`` makes the predictor of the model that was opened, None: it gives rows alone.

    ``security``: who may talk to it, opened; InvalidArgument where others than this machine could, and nothing tells them apart.
    ``serving``: what is served, where that is no cut of ``store``.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    over = Event()
    serving = serving or Serving(store, trust=settings.trust, recall=settings.recall, part=settings.part)
    service = ServingService(serving, max_keys=settings.max_keys)
    models = Models(service)
    server = GrpcServer(
        Handlers(service, InferenceService(models)),
        "Serving",
        listen=settings.listen,
        threads=settings.threads,
        request_memory_bytes=settings.request_memory_bytes,
        security=security,
        serving=lambda: models.ready and not over.is_set(),
    )
    security = security or Security()
    rest = Rest(models, security, server.memory, description=description())
    http = None
    if settings.http:
        security.check_listen(settings.http, "--http")
        http = HttpServer(rest.answer, listen=settings.http, admit=rest.admit, context=security.http_context)

    def unless_over(done: int, total: int) -> None:
        if over.is_set():
            raise _Over
        progress(done, total)

    with (
        _signals(over),
        # One product of a small batch is one thread's, and training's numbers are those of one.
        limit_blas(1),
        contextlib.suppress(_Over),
        observed("serving", settings.metrics_port, settings.metrics_host, security=security) as telemetry,
    ):
        telemetry.registry.add(server_source(server))
        telemetry.registry.add(serving_source(service))
        telemetry.registry.add(prediction_source(models))
        try:
            if http is not None:
                telemetry.registry.add(http_source(http, rest))
            address = server.start()
            listening(address, telemetry.address, http.start() if http else "")
            warm_up()
            warm_up_fresh()
            warm_up_parts()
            serving.load(settings.cut, progress=unless_over)
            serving.pinned = settings.cut is not None and not settings.follow_cuts
            models.begin(predicts(serving.current))
            keep_what_is_loaded()
            if settings.follow_cuts:
                serving.follow()
            ready(serving)
            over.wait()
            logger.info("event=draining seconds=%g", settings.drain_seconds)
            # In a wait of its own, which a second signal ends.
            Event().wait(settings.drain_seconds)
        finally:
            # First: a cut of many gigabytes may be under way, here or in a call that would be waited for.
            serving.close()
            if http is not None:
                http.stop(GRACE_SECONDS)
            server.stop(GRACE_SECONDS)
            serving.dispose()


class _Over(Exception):
    """A signal came while the model was being opened."""


@contextlib.contextmanager
def _signals(over: Event) -> Iterator[None]:
    """Have SIGTERM and SIGINT set ``over`` within the body; a second one ends the process as it always would."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def came(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        over.set()

    for number in before:
        signal.signal(number, came)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
