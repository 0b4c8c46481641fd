# SPDX-License-Identifier: Apache-2.0
"""Serving with tokens and TLS: who may look up, who may change what is served, and that both clients ask as they have to."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys

import grpc
import pytest
from security_rig import REFLECTION, Authority, bearer, opened, paths_of, raw, texts_of, tls_fields, write_tokens

from oarlock.cli.main import main
from oarlock.proto.bulk import Bulk
from oarlock.proto.errors import InvalidArgument, PermissionDenied, PSError, Unauthenticated
from oarlock.proto.health_pb2 import HealthCheckRequest
from oarlock.proto.rpc.health import CHECK
from oarlock.serving import AsyncClient, Client
from oarlock.serving.process import Settings, run
from oarlock.serving.swap import Serving

SECONDS = 120.0


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def tokens(tmp_path):
    """A file of all tokens, and one of each role."""
    path = write_tokens(tmp_path / "tokens")
    return path, {role: write_tokens(tmp_path / role, f'{role} = "{text}"') for role, text in texts_of(path).items()}


@pytest.fixture
def loaded(model):
    serving = Serving(model.store)
    serving.load()
    return serving


def asked_by_thread(address, verb, **options):
    with Client(address, **options) as client:
        return verb(client)


def asked_by_loop(address, verb, **options):
    async def body():
        async with AsyncClient(address, **options) as client:
            return await verb(client)

    return asyncio.run(body())


def look_up(client):
    return client.lookup({"user": [7, 8]})


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
@pytest.mark.parametrize("asked", [asked_by_thread, asked_by_loop])
def test_who_looks_looks_up_and_only_who_steers_changes_what_is_served(asked, frames, tokens, loaded, serve, model):
    path, of = tokens
    service, address = serve(loaded, opened(token_file=path))
    model.cut(2)
    for file in (path, *of.values()):
        found = asked(address, look_up, frames=frames, security=opened(token_file=file))
        assert found["user"][:, 0].tolist() == [1007.0, 1008.0]
        described = asked(address, lambda c: c.describe(), frames=frames, security=opened(token_file=file))
        assert described.version.cut == 1
    for role in ("read", "train"):
        with pytest.raises(PermissionDenied, match=r"Serving\.Rollback needs a token of role admin"):
            asked(address, lambda c: c.rollback(newest=True), frames=frames, security=opened(token_file=of[role]))
    for security in (None, opened(token_file=write_tokens(path.with_name("other")))):
        for verb in (look_up, lambda c: c.describe()):
            with pytest.raises(Unauthenticated, match="give --token-file FILE"):
                asked(address, verb, frames=frames, security=security)
    assert loaded.current.version.cut == 1
    for file in (of["admin"], path):
        assert asked(address, lambda c: c.rollback(newest=True), security=opened(token_file=file)).version.cut == 2
    assert service.asked["user"] == 8


def test_frames_are_what_who_looks_looks_up_by(tokens, loaded, serve, monkeypatch):
    """The answer would be the same without them."""
    path, of = tokens
    service, address = serve(loaded, opened(token_file=path))
    beside = []
    lookup = service.lookup
    monkeypatch.setattr(service, "lookup", lambda request: beside.append(isinstance(request, Bulk)) or lookup(request))
    for asked in (asked_by_thread, asked_by_loop):
        for frames in (True, False):
            asked(address, look_up, frames=frames, security=opened(token_file=of["read"]))
    assert beside == [True, False, True, False]


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
@pytest.mark.parametrize("asked", [asked_by_thread, asked_by_loop])
def test_clients_know_the_server_by_its_certificate(asked, frames, tmp_path, authority, tokens, loaded, serve):
    path, of = tokens
    fields = tls_fields(tmp_path, authority)
    _, address = serve(loaded, opened(token_file=path, mutual_tls=True, **fields))
    for given in (fields, {**fields, "tls_name": "localhost"}):
        found = asked(address, look_up, frames=frames, security=opened(token_file=of["read"], **given))
        assert found.version.cut == 1
    # Of another authority; without a certificate of its own; without TLS.
    elsewhere = {"tls_ca": str(Authority(tmp_path, "elsewhere").path)}
    for given in (elsewhere, {"tls_ca": fields["tls_ca"]}, {}):
        with pytest.raises(PSError, match="not answered in time"):
            asked(address, look_up, frames=frames, timeout_seconds=0.5, security=opened(token_file=of["read"], **given))


@pytest.mark.parametrize("asked", [asked_by_thread, asked_by_loop])
def test_no_token_goes_to_another_machine_in_the_clear(asked, tokens):
    path, _ = tokens
    with pytest.raises(PermissionDenied, match=r"no token is sent to 192\.0\.2\.1:1 without TLS"):
        asked("192.0.2.1:1", look_up, security=opened(token_file=path))


def test_a_blocking_client_takes_newer_certificates_and_tokens(tmp_path, authority, tokens, loaded, serve):
    path, _ = tokens
    fields = tls_fields(tmp_path, authority)
    _, address = serve(loaded, opened(token_file=path, **fields))
    stranger = Authority(tmp_path, "stranger")
    ca, own = tmp_path / "ca.pem", write_tokens(tmp_path / "own", f'read = "{texts_of(path)["read"][::-1]}"')
    ca.write_bytes(stranger.path.read_bytes())
    security = opened(look_seconds=0.0, token_file=own, tls_ca=ca)
    with Client(address, security=security, frames=False) as client:
        with pytest.raises(PSError, match="not answered in time"):
            client.lookup({"user": [7]}, timeout_seconds=0.3)
        ca.write_bytes(authority.path.read_bytes())
        with pytest.raises(Unauthenticated):
            client.lookup({"user": [7]})
        write_tokens(own, f'read = "{texts_of(path)["read"]}"')
        assert client.lookup({"user": [7]}).version.cut == 1


def test_schemas_are_told_to_who_has_a_token(tokens, loaded, serve):
    reflection = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2")
    path, _ = tokens
    _, address = serve(loaded, opened(token_file=path))
    asked = reflection.ServerReflectionRequest(list_services="").SerializeToString()
    with grpc.insecure_channel(address) as channel:
        assert raw(channel, REFLECTION, (), asked) == (grpc.StatusCode.UNAUTHENTICATED, [])
        status, answers = raw(channel, REFLECTION, bearer(texts_of(path)["read"]), asked)
        assert (status, len(answers)) == (grpc.StatusCode.OK, 1)


@pytest.mark.parametrize("field", ["listen", "metrics_host"])
def test_others_reach_it_only_where_callers_are_told_apart(field, model):
    given = {"listen": "0.0.0.0:0"} if field == "listen" else {"metrics_host": "0.0.0.0", "metrics_port": 0}
    ready = []
    with pytest.raises(InvalidArgument, match=r"cannot listen on 0\.0\.0\.0.*--token-file FILE"):
        run(model.store, Settings(**given), ready=ready.append)
    assert not ready


def test_the_command_refuses_before_it_opens_anything(model, capsys, monkeypatch):
    monkeypatch.delenv("OARLOCK_TOKEN_FILE", raising=False)
    assert main(["serve", str(model.folder), "--listen", "0.0.0.0:0"]) == 1
    assert "cannot listen on 0.0.0.0:0 (--listen): other machines can reach it" in capsys.readouterr().err


def test_a_jobs_folder_is_served_behind_the_tokens_of_the_job(model, tokens, monkeypatch, tmp_path):
    path, of = tokens
    told = []
    monkeypatch.delenv("OARLOCK_TOKEN_FILE", raising=False)
    monkeypatch.setattr(
        "oarlock.cli.serve.run",
        lambda _, settings, security, **__: told.append((settings.cut, security.spec.token_file)),
    )
    (tmp_path / "job.toml").write_text(f'[security]\ntoken_file = "{path}"\n')
    assert model.folder == tmp_path / "checkpoints"
    for words in ([tmp_path], [f"{tmp_path}@1"], [tmp_path, "--token-file", of["read"]], [model.folder]):
        assert main(["serve", *map(str, words)]) == 0
    assert told == [(None, str(path)), (1, str(path)), (None, str(of["read"])), (None, "")]


def page(address, path, context, text=""):
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=SECONDS, context=context)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {text}"} if text else {})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.slow
def test_every_method_and_route_of_the_process_asks_for_a_token(
    model, tmp_path, authority, tokens, capsys, monkeypatch
):
    path, of = tokens
    fields = tls_fields(tmp_path, authority)
    options = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "-P", "-m", "oarlock.cli.main", "serve", str(model.folder), "--json"]
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [*command, "--metrics-port", "0", "--log-level", "debug", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # As options or in the environment, like all processes.
            env={**os.environ, "OARLOCK_TOKEN_FILE": str(path)},
        )
        stack.callback(process.communicate)
        stack.callback(process.kill)
        facts = json.loads(process.stdout.readline())
        address, metrics = facts["address"], facts["metrics"]
        credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
        with grpc.secure_channel(address, credentials) as channel:
            for _, each in [*paths_of("Serving"), (None, REFLECTION), (None, "/oarlock.Shard/Pull"), (None, "/")]:
                for metadata in ((), bearer("x" * 43)):
                    assert raw(channel, each, metadata) == (grpc.StatusCode.UNAUTHENTICATED, []), each
            asked = HealthCheckRequest(service="oarlock.Serving").SerializeToString()
            assert raw(channel, CHECK, (), asked) == (grpc.StatusCode.OK, [b"\x08\x01"])
        context = ssl.create_default_context(cafile=fields["tls_ca"])
        assert [page(metrics, each, context) for each in ("/metrics", "/", "/debug", "/healthz")] == [401] * 3 + [200]
        assert page(metrics, "/metrics", context, texts_of(path)["read"]) == 200
        assert page(metrics, "/metrics", context, texts_of(path)["train"]) == 401
        monkeypatch.delenv("OARLOCK_TOKEN_FILE", raising=False)
        looker = ["--token-file", str(of["read"]), "--tls-ca", fields["tls_ca"]]
        assert main(["serve", "status", address, "--json", *looker]) == 0
        assert json.loads(capsys.readouterr().out)["cut"] == 1
        assert main(["serve", "rollback", address, *looker]) == 1
        assert "needs a token of role admin" in capsys.readouterr().err
        assert main(["serve", "status", address, "--tls-ca", fields["tls_ca"]]) == 1
        assert "give --token-file FILE" in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        assert not re.search("Traceback|[Ee]rror", said), said
        assert "event=call_denied reason=token" in said
        assert not any(text in out + said for text in texts_of(path).values())
