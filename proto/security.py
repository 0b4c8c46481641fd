# SPDX-License-Identifier: Apache-2.0
"""Security: who may talk to a process, and by which secrets it talks to others. Paths of secrets are configuration; secrets are
in files.

Invariant: nobody listens where another machine could reach it unless callers are told apart, by tokens or by certificates; no
token goes in the clear to another machine unless the configuration says that it may. A process without any of this talks to its
own machine alone. Any thread.
"""

import ipaddress
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from oarlock.proto.errors import InvalidArgument, PermissionDenied
from oarlock.proto.roles import ADMIN, OWN, READ, ROLES
from oarlock.proto.tls import Pem, client_context_of, context_of, read_pem
from oarlock.proto.tokens import Tokens, read_tokens
from oarlock.proto.watched import LOOK_SECONDS, Watched

SCHEME = "Bearer "
# Requests of people's tools, which a shard answers beside training.
READ_REQUESTS_PER_SECOND = 100.0
_HOW = "docs/security.md"


@dataclass(frozen=True)
class SecuritySpec:
    """What is configured: paths, never what is in them.

    ``token_file``: tokens by role. ``tls_cert``, ``tls_key``: what a server shows, and a client that is asked to. ``tls_ca``:
    who signs the certificates of the other side. ``tls_name``: the name that servers' certificates are for, in place of the
    host that is called. ``mutual_tls``: callers have to show a certificate, too. ``plaintext_tokens``: tokens may go to other
    machines without TLS. ``read_requests_per_second``: of all callers of role read together, for each process; 0: any number.
    ``roots``: folders or URLs below which a request may name checkpoints, beside the job's own.
    """

    token_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    tls_name: str = ""
    mutual_tls: bool = False
    plaintext_tokens: bool = False
    read_requests_per_second: float = READ_REQUESTS_PER_SECOND
    roots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots", tuple(self.roots))
        if bool(self.tls_cert) != bool(self.tls_key):
            raise InvalidArgument("tls_cert and tls_key go together: give both, or neither")
        if self.mutual_tls and not (self.tls_cert and self.tls_ca):
            raise InvalidArgument("mutual_tls asks callers for certificates: give tls_cert, tls_key and tls_ca")
        if not 0 <= self.read_requests_per_second <= 1e9:
            raise InvalidArgument(
                f"read_requests_per_second = {self.read_requests_per_second}: give a number from 0 (no limit) to 1e9"
            )

    def arguments(self) -> list[str]:
        """Return the options that give a process this configuration."""
        out: list[str] = []
        for each in fields(self):
            value, option = getattr(self, each.name), option_of(each.name)
            if isinstance(value, tuple):
                out += [word for one in value for word in (option, one)]
            elif value is True:
                out.append(option)
            elif value != each.default:
                out += [option, str(value)]
        return out


def option_of(name: str) -> str:
    """Return the option of a field of a SecuritySpec."""
    return "--" + ("root" if name == "roots" else name.replace("_", "-"))


class Security:
    """What a process goes by; ``open`` before anything else. ``SecuritySpec()``: nothing is asked of anybody.

    ``own``: it is one of the job's own, of which the launcher is one, too; else somebody's tool.
    """

    def __init__(
        self, spec: SecuritySpec | None = None, *, own: bool = False, look_seconds: float = LOOK_SECONDS
    ) -> None:
        self._order = OWN if own else ROLES
        self.spec = spec or SecuritySpec()
        self._look_seconds = look_seconds
        self._tokens: Watched[Tokens] | None = None
        self._pem: Watched[Pem] | None = None
        # By what they are for, each with the version of the files that it was made of.
        self._contexts: dict[str, tuple[int, ssl.SSLContext]] = {}

    def open(self) -> "Security":
        """Read the files; InvalidArgument says which of them cannot be used, and why."""
        spec = self.spec
        if spec.token_file:
            path = Path(spec.token_file)
            self._tokens = Watched([path], lambda: read_tokens(path), look_seconds=self._look_seconds).open()
        paths = [Path(each) if each else None for each in (spec.tls_cert, spec.tls_key, spec.tls_ca)]
        there = [path for path in paths if path is not None]
        if there:
            self._pem = Watched(there, lambda: read_pem(*paths), look_seconds=self._look_seconds).open()
        return self

    # Of a server

    @property
    def tokens(self) -> Tokens | None:
        """The tokens, None if none are asked for."""
        return None if self._tokens is None else self._tokens.now()

    @property
    def identifies(self) -> bool:
        """Whether callers are told apart, so that not everybody who reaches the process may talk to it."""
        return self._tokens is not None or self.spec.mutual_tls

    @property
    def serves_tls(self) -> bool:
        return bool(self.spec.tls_cert)

    def check_listen(self, listen: str, option: str) -> None:
        """Raise InvalidArgument if others than this machine could reach ``listen``, and nothing tells callers apart."""
        if not self.identifies and not is_local(listen):
            raise InvalidArgument(
                f"cannot listen on {listen} ({option}): other machines can reach it, where anybody could read and change the "
                "model: give --token-file FILE (`oarlock tokens FILE` makes one) and, for TLS, --tls-cert and --tls-key; or "
                f"--mutual-tls; or listen on 127.0.0.1 ({_HOW})"
            )

    def needs(self, roles: Collection[str]) -> None:
        """Raise InvalidArgument unless there is a token of each of ``roles``, if there are tokens at all."""
        if self.tokens is not None and (
            missing := [role for role in ROLES if role in roles and not self.tokens.of.get(role)]
        ):
            raise InvalidArgument(
                f"token file {self.spec.token_file} has no token of {', '.join(missing)}: give one for each"
            )

    def may_read(self, header: str) -> bool:
        """Tell whether the value of an Authorization header opens what the role read may see."""
        tokens = self.tokens
        if tokens is None:
            return True
        presented = presented_in(header)
        return presented is not None and tokens.role_of(presented) in (READ, ADMIN)

    def http_context(self) -> ssl.SSLContext | None:
        """Return what a page over HTTPS is served with, None for HTTP. Certificates are asked for where there are no tokens."""
        if not self.serves_tls:
            return None
        return self._context("http", lambda: self._server_context(ask=self.spec.mutual_tls and self._tokens is None))

    def frames_context(self) -> ssl.SSLContext | None:
        """Return what frames from other machines are served with, None for no TLS. Certificates are asked for as by gRPC."""
        if not self.serves_tls:
            return None
        return self._context("frames", lambda: self._server_context(ask=self.spec.mutual_tls))

    def _server_context(self, *, ask: bool) -> ssl.SSLContext:
        spec = self.spec
        return context_of(Path(spec.tls_cert), Path(spec.tls_key), Path(spec.tls_ca) if ask else None)

    def _context(self, of: str, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        """Return the context of the newest files."""
        pem = self._pem
        if pem is None:
            # None would mean that nothing is to be encrypted.
            raise RuntimeError("the files of TLS were not read: open() comes first")
        pem.now()
        version, found = pem.version, self._contexts.get(of)
        if found is None or found[0] != version:
            try:
                found = self._contexts[of] = (version, make())
            except InvalidArgument:
                # The files are being replaced again.
                if found is None:
                    raise
        return found[1]

    # Of both sides

    @property
    def pem(self) -> Pem | None:
        """The newest certificates, None without TLS."""
        return None if self._pem is None else self._pem.now()

    @property
    def pem_version(self) -> int:
        """Counts the versions of the certificates that were read."""
        if self._pem is None:
            return 0
        self._pem.now()
        return self._pem.version

    # Of a client

    @property
    def calls_tls(self) -> bool:
        return bool(self.spec.tls_ca or self.spec.tls_cert)

    def calling_context(self) -> ssl.SSLContext | None:
        """Return what frames go to other machines with, None for no TLS."""
        paths = [Path(each) if each else None for each in (self.spec.tls_cert, self.spec.tls_key, self.spec.tls_ca)]
        return self._context("calling", lambda: client_context_of(*paths)) if self.calls_tls else None

    def authorization(self, roles: Collection[str], address: str, method: str) -> str | None:
        """Return the header with which to call a method that ``roles`` may call, None without tokens; PermissionDenied."""
        tokens = self.tokens
        if tokens is None:
            return None
        if not (self.calls_tls or self.spec.plaintext_tokens or is_local(address)):
            raise PermissionDenied(
                f"no token is sent to {address} without TLS, where others could read it: give --tls-ca, or --plaintext-tokens "
                f"if the network between is yours alone ({_HOW})",
                address=address,
            )
        found = tokens.first(roles, self._order)
        if found is None:
            raise PermissionDenied(
                f"{method} needs a token of role {' or '.join(r for r in ROLES if r in roles)}: token file "
                f"{self.spec.token_file} has none",
                method=method,
            )
        return SCHEME + found.reveal()


def presented_in(header: str | bytes) -> bytes | None:
    """Return the token in the value of an authorization header, None if there is none."""
    data = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    scheme = SCHEME.encode()
    return data[len(scheme) :] if data[: len(scheme)].lower() == scheme.lower() else None


@lru_cache(maxsize=4096)
def is_local(address: str) -> bool:
    """Tell whether only this machine can reach ``host:port``, ``host`` or ``unix:PATH``."""
    if address.startswith(("unix:", "in-process:")):
        return True
    host = address
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        host = address.partition(":")[0]
    if host.lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
