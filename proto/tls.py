# SPDX-License-Identifier: Apache-2.0
"""TLS from files: a certificate with its key, and the authorities whose certificates the other side is to have.

Invariant: a certificate is taken only with the key that belongs to it, and both only if TLS itself takes them; so what replaces
them while the process runs is whole. The key's file is its owner's alone. Any thread.
"""

import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from oarlock.proto.errors import InvalidArgument
from oarlock.proto.watched import read_secret_file

MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Pem:
    """What the files hold; empty: not given."""

    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    authorities: bytes = b""


def read_pem(certificate: Path | None, key: Path | None, authorities: Path | None) -> Pem:
    """Return what the files hold; InvalidArgument names the one that cannot be used."""
    pem = Pem(
        _read(certificate, "TLS certificate"),
        b"" if key is None else read_secret_file(key, "TLS key", MAX_FILE_BYTES),
        _read(authorities, "TLS authorities"),
    )
    if certificate is not None and key is not None:
        context_of(certificate, key, None)
    if authorities is not None:
        context_of(None, None, authorities)
    return pem


def context_of(certificate: Path | None, key: Path | None, authorities: Path | None) -> ssl.SSLContext:
    """Return a server's context, which asks for a certificate if ``authorities`` are given; InvalidArgument."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    _load(context, certificate, key, authorities)
    if authorities is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context_of(certificate: Path | None, key: Path | None, authorities: Path | None) -> ssl.SSLContext:
    """Return a client's context, which shows the certificate to who asks; without ``authorities`` it believes whom the system
    does. InvalidArgument."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_RENEGOTIATION
    _load(context, certificate, key, authorities)
    if authorities is None:
        context.load_default_certs()
    return context


def _load(context: ssl.SSLContext, certificate: Path | None, key: Path | None, authorities: Path | None) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None and key is not None:
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise InvalidArgument(
                f"TLS certificate {certificate} with key {key} cannot be used: {_words(error)}"
            ) from None
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except (ssl.SSLError, OSError) as error:
            raise InvalidArgument(f"TLS authorities {authorities} cannot be used: {_words(error)}") from None
        if not context.get_ca_certs():
            raise InvalidArgument(f"TLS authorities {authorities} hold no certificate of an authority")


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not, in a file that only its owner may read")


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "no certificate or key in PEM form"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _read(path: Path | None, what: str) -> bytes:
    if path is None:
        return b""
    try:
        if not path.is_file():
            raise InvalidArgument(f"{what} {path} is no file")
        data = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{what} {path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument(f"{what} {path} has more than {MAX_FILE_BYTES} bytes")
    return data
