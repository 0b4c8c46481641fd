# SPDX-License-Identifier: Apache-2.0
"""The other process of the benchmark `security`: one handler behind nothing, behind tokens, and behind tokens and TLS.

Invariant: as in peer.py. What it tells are paths of secrets, which are gone with it.
"""

import dataclasses
import datetime
import ipaddress
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from oarlock.proto.arrays import Part, pack
from oarlock.proto.bulk import Bulk
from oarlock.proto.common_pb2 import HelloReply, HelloRequest
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcServer
from oarlock.proto.security import Security, SecuritySpec
from oarlock.proto.shard_pb2 import PullReply, PullRequest
from oarlock.proto.tokens import new_tokens

ROWS, DIM = 16384, 16


class Handler:
    """Answers a pull with a megabyte of rows."""

    def __init__(self) -> None:
        self._rows = np.ones((ROWS, DIM), np.float32)

    def hello(self, request: HelloRequest) -> HelloReply:
        return HelloReply(protocol=PROTOCOL)

    def pull(self, sent: PullRequest | Bulk) -> PullReply | Bulk:
        # Beside the message where that can be, as a shard does.
        beside: list[Part] | None = [] if isinstance(sent, Bulk) else None
        reply = PullReply(rows=[pack(self._rows, beside)])
        return reply if beside is None else Bulk(reply, beside)


def secrets_in(folder: Path) -> dict[str, SecuritySpec]:
    """Write tokens and a certificate; return what each way goes by."""
    tokens, cert, key = (folder / name for name in ("tokens", "cert", "key"))
    for path in (tokens, key):
        os.close(os.open(path, os.O_CREAT, 0o600))
    tokens.write_text(new_tokens())
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(private, hashes.SHA256())
    )
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key.write_bytes(private.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    with_tls = SecuritySpec(token_file=str(tokens), tls_cert=str(cert), tls_key=str(key), tls_ca=str(cert))
    return {"none": SecuritySpec(), "tokens": SecuritySpec(token_file=str(tokens)), "tls": with_tls}


def main() -> int:
    """Serve until standard input closes."""
    with tempfile.TemporaryDirectory(prefix="oarlock-benchmark-") as folder:
        servers, told = [], {}
        for how, spec in secrets_in(Path(folder)).items():
            servers.append(GrpcServer(Handler(), "Shard", listen="127.0.0.1:0", security=Security(spec).open()))
            told[how] = {"address": servers[-1].start(), "spec": dataclasses.asdict(spec)}
        print(json.dumps(told), flush=True)
        for _ in sys.stdin:
            print(time.process_time(), flush=True)
        for server in servers:
            server.stop(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
