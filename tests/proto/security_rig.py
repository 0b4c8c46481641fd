# SPDX-License-Identifier: Apache-2.0
"""What the tests of security share: tokens, certificates made when the test runs, and calls made by hand.

A conftest loads it as ``security_rig``.
"""

import contextlib
import datetime
import ipaddress

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from oarlock.proto.methods import METHODS, methods_of
from oarlock.proto.rpc import GrpcServer, sockets
from oarlock.proto.security import Security, SecuritySpec
from oarlock.proto.tokens import new_tokens, read_tokens

SECONDS = 20
# A method of gRPC that is beside ours where grpcio-reflection is installed.
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def write_tokens(path, text=None, mode=0o600):
    path.write_text(new_tokens() if text is None else text)
    path.chmod(mode)
    return path


def texts_of(path):
    """Return the tokens in a file, by role: the first of each."""
    return {role: kept[0].reveal() for role, kept in read_tokens(path).of.items()}


class Authority:
    """Signs certificates. ``path``: its own."""

    def __init__(self, folder, name="authority"):
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._built(self._name, self._key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _built(self, subject, public_key, constraints, *extensions):
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(constraints, critical=True)
        )
        for each in extensions:
            builder = builder.add_extension(each, critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, name, hosts=("localhost", "127.0.0.1"), into=None):
        """Write a certificate for ``hosts`` and its key; return their paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [_host(each) for each in hosts]
        certificate = self._built(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            key.public_key(),
            x509.BasicConstraints(ca=False, path_length=None),
            x509.SubjectAlternativeName(names),
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
        )
        cert_path, key_path = into or (self._folder / f"{name}.pem", self._folder / f"{name}.key")
        key_path.touch(mode=0o600)
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cert_path, key_path


def _host(text):
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def tls_fields(folder, authority=None, name="server", hosts=("localhost", "127.0.0.1")):
    """Return the fields of a SecuritySpec with a certificate of its own."""
    authority = authority or Authority(folder)
    cert, key = authority.issue(name, hosts)
    return {"tls_cert": str(cert), "tls_key": str(key), "tls_ca": str(authority.path)}


def opened(look_seconds=1.0, own=False, **fields):
    values = {n: v if isinstance(v, bool | float | tuple) else str(v) for n, v in fields.items()}
    return Security(SecuritySpec(**values), own=own, look_seconds=look_seconds).open()


class Recorder:
    """A handler of any service: answers everything with an empty message, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        method = next((m for m in METHODS.values() if m.attribute == name), None)
        if method is None:
            raise AttributeError(name)

        def answer(request):
            self.asked.append(name)
            return next(m for m in METHODS.values() if m.attribute == name and m.request is type(request)).reply()

        return answer


def paths_of(service):
    """Return (method, path) of all that a server of ``service`` answers, streams included."""
    found = methods_of(service)
    return [(m, m.path) for m in found] + [(m, m.path + "Stream") for m in found if m.streamed]


def raw(channel, path, metadata=(), data=b""):
    """Call by hand; return (status, answers)."""
    call = channel.stream_stream(path)(iter([data]), metadata=metadata, timeout=SECONDS)
    answers = []
    with contextlib.suppress(grpc.RpcError):
        answers.extend(call)
    return call.code(), answers


def bearer(text):
    return (("authorization", f"Bearer {text}"),)


def from_elsewhere(monkeypatch):
    """Have connections of frames made as from another machine; return those that were made."""
    made, connect = [], sockets.connect

    def by_tcp(address, *called):
        if address.startswith(sockets.ABSTRACT):
            raise ConnectionRefusedError
        made.append(connect(address, *called))
        return made[-1]

    monkeypatch.setattr(sockets, "connect", by_tcp)
    return made


def serve(handler, service="Shard", **fields):
    """Return a started server that goes by these fields of a SecuritySpec."""
    server = GrpcServer(handler, service, listen="127.0.0.1:0", threads=16, security=opened(**fields))
    server.start()
    return server
