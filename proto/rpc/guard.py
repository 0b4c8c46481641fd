# SPDX-License-Identifier: Apache-2.0
"""The guard of a gRPC server: who calls, and whether they may, before anything of the call is read and before it takes a place.

Invariant: without a token of a role that may, a call is answered by a refusal and nothing else, whatever it names; only health
(health.py) is open. Which part of a token was wrong is told to nobody. Called by gRPC's own thread for each call, and once for
each stream, so the requests of a stream cost nothing.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

import grpc

from oarlock.proto.errors import PermissionDenied, PSError, Unauthenticated, Unavailable
from oarlock.proto.methods import SOCKETS, Method
from oarlock.proto.rate import RateLimit
from oarlock.proto.roles import ADMIN, READ, ROLES
from oarlock.proto.rpc.health import Behaviour
from oarlock.proto.rpc.status import FAILURE_KEY, to_status
from oarlock.proto.security import Security, presented_in

logger = logging.getLogger(__name__)

AUTHORIZATION = "authorization"
# Lines in the log about callers that were turned away.
_LINES_PER_SECOND = 1.0
UNKNOWN = "this process answers those who give a token of its job: give --token-file FILE, the job's (docs/security.md)"

# (method, role): what works on a call whose caller has that role; empty: nobody is asked for one.
Open = Callable[[Method, str], Behaviour]


class Guard(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Lets calls of ``methods`` (by path) in, each with what ``open_`` returns for it, and counts those that it does not.

    ``health``: works on the calls that are open to everybody, by path, ``known_health`` on those of them whose caller has some
    role; ``reflection``: on those of whoever has one.
    """

    def __init__(
        self,
        security: Security,
        methods: Mapping[str, tuple[Method, Open]],
        *,
        health: Mapping[str, Behaviour],
        known_health: Mapping[str, Behaviour],
        reflection: grpc.GenericRpcHandler,
    ) -> None:
        self._security = security
        self._methods = methods
        self._reflection = reflection
        self._health = {path: _handler(each) for path, each in health.items()}
        self._known_health = {path: _handler(each) for path, each in known_health.items()}
        # Without tokens every call of a method is worked on by the same.
        self._free = {path: _handler(open_(method, "")) for path, (method, open_) in methods.items()}
        self._limit = RateLimit(security.spec.read_requests_per_second)
        self._lines = RateLimit(_LINES_PER_SECOND)
        self._lock = Lock()
        self.denied: Counter[str] = Counter()

    def service(self, call: Any) -> Any:
        """Return what works on a call; None for a method that there is not."""
        if call.method in self._health:
            known = self._known_health.get(call.method)
            return self._health[call.method] if known is None or not self._role(call.invocation_metadata) else known
        if self._security.tokens is None:
            return self._free.get(call.method) or self._reflection.service(call)
        found = self._methods.get(call.method)
        try:
            role = self._role(call.invocation_metadata)
            if not role:
                raise Unauthenticated(UNKNOWN)
            if found is None:
                return self._reflection.service(call)
            method, open_ = found
            self._let_in(role, method)
        except PSError as error:
            self._count(error, call.method)
            return _refusal(error)
        return _handler(open_(method, role))

    def _role(self, metadata: Sequence[tuple[str, str | bytes]]) -> str:
        """Return the role of a caller's token, "" for a stranger."""
        given = [value for name, value in metadata if name == AUTHORIZATION]
        tokens = self._security.tokens
        presented = presented_in(given[0]) if len(given) == 1 else None
        return "" if tokens is None or presented is None else tokens.role_of(presented) or ""

    def _let_in(self, role: str, method: Method) -> None:
        if role not in method.roles:
            raise denied(role, method, method.roles)
        # What a process is there for, its places and its memory bound.
        looks = method.counted and not method.frame and method.name != SOCKETS
        if role == READ and looks and not self._limit.enter():
            raise Unavailable(
                f"callers of role {READ} ask this process for more than "
                f"{self._security.spec.read_requests_per_second:g} things a second: ask again in a moment"
            )

    def _count(self, error: PSError, path: str) -> None:
        reason = (
            "rate" if isinstance(error, Unavailable) else "role" if isinstance(error, PermissionDenied) else "token"
        )
        with self._lock:
            self.denied[reason] += 1
            total = self.denied[reason]
        if self._lines.enter():
            # What was called is the caller's own text.
            logger.warning("event=call_denied reason=%s method=%r denied_so_far=%d", reason, path[:80], total)


def check_changes(method: Method, role: str, request: Any) -> None:
    """Raise PermissionDenied for a request that changes something, of a caller that may only look."""
    if role not in ("", ADMIN) and method.changes is not None and method.changes(request):
        raise denied(role, method, frozenset({ADMIN}))


def denied(role: str, method: Method, roles: frozenset[str]) -> PermissionDenied:
    return PermissionDenied(
        f"{method.name} is not for role {role}: give a token of role {' or '.join(r for r in ROLES if r in roles)}",
        method=method.name,
    )


def _handler(behaviour: Behaviour) -> grpc.RpcMethodHandler:
    # Single calls are served as streams of one message, which look the same on the wire: for those the thread waits until the
    # answer has gone out, where gRPC would keep any number of answers that nobody reads.
    return grpc.stream_stream_rpc_method_handler(behaviour)


def _refusal(error: PSError) -> grpc.RpcMethodHandler:
    def refuse_call(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        refuse(context, error)
        return iter(())

    return _handler(refuse_call)


def refuse(context: grpc.ServicerContext, error: PSError) -> None:
    """End a call with an error."""
    code, text, failure = to_status(error)
    context.set_trailing_metadata(((FAILURE_KEY, failure),))
    context.set_code(code)
    context.set_details(text)
