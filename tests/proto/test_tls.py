# SPDX-License-Identifier: Apache-2.0
"""TLS from files: who is not whom it should be is not talked to, on either side, and files are read again when they change."""

import asyncio

import pytest
from security_rig import Authority, Recorder, opened, serve, texts_of, tls_fields, write_tokens

from oarlock.proto.common_pb2 import HelloRequest, SocketsRequest
from oarlock.proto.errors import InvalidArgument, PSError, Unavailable
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.rpc.sockets import ABSTRACT
from oarlock.proto.shard_pb2 import PullRequest

HELLO = HelloRequest(protocol=PROTOCOL)


def met(address, method="Shard.Hello", request=HELLO, frames=True, seconds=3, **fields):
    """Return the error that a call with these fields meets, None for an answer."""

    async def body():
        transport = GrpcTransport(frames=frames, security=opened(**fields))
        try:
            await transport.call(address, method, request, timeout_seconds=seconds)
        except PSError as error:
            return error
        finally:
            await transport.close()
        return None

    return asyncio.run(body())


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def test_both_sides_with_tls_and_tokens_talk_by_frames_and_without(tmp_path, authority):
    fields = {**tls_fields(tmp_path, authority), "token_file": write_tokens(tmp_path / "t")}
    server = serve(Recorder(), **fields)
    for frames in (True, False):
        assert met(server.address, **fields) is None
        assert met(server.address, "Shard.Pull", PullRequest(), frames=frames, **fields) is None
    server.stop(0)


def test_a_name_that_is_not_the_servers_is_not_talked_to(tmp_path, authority):
    server = serve(Recorder(), **tls_fields(tmp_path, authority, hosts=("shard.example",)))
    assert isinstance(met(server.address, tls_ca=authority.path), Unavailable)
    assert met(server.address, tls_ca=authority.path, tls_name="shard.example") is None
    assert isinstance(met(server.address, tls_ca=authority.path, tls_name="other.example"), Unavailable)
    server.stop(0)


def test_an_authority_that_is_not_ours_and_no_tls_at_all_are_not_talked_to(tmp_path, authority):
    server = serve(Recorder(), **tls_fields(tmp_path, authority))
    other = Authority(tmp_path, "other")
    assert isinstance(met(server.address, tls_ca=other.path), Unavailable)
    assert isinstance(met(server.address), Unavailable)
    server.stop(0)
    open_one = serve(Recorder())
    assert isinstance(met(open_one.address, tls_ca=authority.path), Unavailable)
    open_one.stop(0)


def test_mutual_tls_lets_in_who_shows_a_certificate_of_the_authority(tmp_path, authority):
    fields = tls_fields(tmp_path, authority)
    server = serve(Recorder(), mutual_tls=True, **fields)
    (tmp_path / "o").mkdir()
    cert, key = Authority(tmp_path / "o", "other").issue("stranger")
    assert met(server.address, **fields) is None
    assert isinstance(met(server.address, tls_ca=authority.path), Unavailable)
    assert isinstance(met(server.address, tls_ca=authority.path, tls_cert=cert, tls_key=key), Unavailable)
    server.stop(0)


def test_with_tls_frames_are_offered_to_this_machine_first_and_to_others_by_a_port(tmp_path, authority):
    fields = {**tls_fields(tmp_path, authority), "token_file": write_tokens(tmp_path / "t")}
    secured = serve(Recorder(), **fields)
    offers = []

    async def body(address, **given):
        transport = GrpcTransport(security=opened(own=True, **given))
        try:
            offers.append(
                await transport.call(address, "Wire.Sockets", SocketsRequest(protocol=PROTOCOL), timeout_seconds=5)
            )
        finally:
            await transport.close()

    asyncio.run(body(secured.address, **fields))
    secured.stop(0)
    assert [a.startswith(ABSTRACT) for a in offers[0].addresses] == [True, False]


def test_a_certificate_is_replaced_while_a_server_runs_and_a_bad_one_is_not_taken(tmp_path, authority, caplog):
    fields = tls_fields(tmp_path, authority)
    server = serve(Recorder(), look_seconds=0.0, **fields)
    newer = Authority(tmp_path, "newer")
    cert, key = (tmp_path / "server.pem", tmp_path / "server.key")
    good = cert.read_bytes()
    assert met(server.address, tls_ca=authority.path) is None

    for spoil in (lambda: cert.write_bytes(b"no certificate"), lambda: cert.write_bytes(newer.path.read_bytes())):
        spoil()
        # Looked at here: a line in the log makes a thread of gRPC's one of Python's, which stays.
        assert server._security.pem is not None
        # What there was goes on.
        assert met(server.address, tls_ca=authority.path) is None
    assert "file_refused" in caplog.text
    assert key.read_text() not in caplog.text
    cert.write_bytes(good)
    newer.issue("server", into=(cert, key))
    assert met(server.address, tls_ca=newer.path) is None
    assert isinstance(met(server.address, tls_ca=authority.path), Unavailable)
    server.stop(0)


def test_a_client_takes_up_its_newer_certificate_without_a_call_that_fails(tmp_path, authority):
    server = serve(Recorder(), mutual_tls=True, **tls_fields(tmp_path, authority))
    cert, key = authority.issue("client")
    security = opened(look_seconds=0.0, tls_ca=authority.path, tls_cert=cert, tls_key=key)

    async def body():
        transport = GrpcTransport(frames=False, security=security)
        try:
            for _ in range(3):
                for _ in range(3):
                    await transport.call(server.address, "Shard.Hello", HELLO, timeout_seconds=10)
                    await transport.call(server.address, "Shard.Pull", PullRequest(), timeout_seconds=10)
                before = transport._channels[server.address]
                authority.issue("client", into=(cert, key))
                await transport.call(server.address, "Shard.Pull", PullRequest(), timeout_seconds=10)
                assert transport._channels[server.address] is not before
        finally:
            await transport.close()

    asyncio.run(body())
    server.stop(0)


@pytest.mark.parametrize("spoil", ["missing", "no pem", "another's key", "readable key", "folder", "encrypted"])
def test_files_that_cannot_be_used_are_refused_by_name(tmp_path, authority, spoil):
    fields = tls_fields(tmp_path, authority)
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    if spoil == "missing":
        cert.unlink()
    elif spoil == "no pem":
        cert.write_text("hello")
    elif spoil == "another's key":
        authority.issue("other", into=(tmp_path / "other.pem", key))
    elif spoil == "readable key":
        key.chmod(0o644)
    elif spoil == "folder":
        key.unlink()
        key.mkdir()
    else:
        key.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    with pytest.raises(InvalidArgument, match=r"server\.(pem|key)"):
        opened(**fields)


def test_authorities_that_are_none_are_refused(tmp_path):
    (tmp_path / "ca").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for name in ("ca", "missing"):
        with pytest.raises(InvalidArgument, match=f"TLS authorities .*{name}"):
            opened(tls_ca=tmp_path / name)


def test_a_key_is_shown_by_nothing(tmp_path, authority):
    security = opened(**tls_fields(tmp_path, authority), token_file=write_tokens(tmp_path / "t"))
    key = (tmp_path / "server.key").read_text().splitlines()[1]
    shown = repr(security.pem) + repr(security.spec) + repr(vars(security)) + " ".join(security.spec.arguments())
    assert key not in shown
    assert not any(text in shown for text in texts_of(tmp_path / "t").values())
