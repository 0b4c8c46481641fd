# SPDX-License-Identifier: Apache-2.0
"""Who may listen where, to whom a token is sent, and how fast somebody may ask."""

import argparse
import dataclasses

import pytest
from security_rig import opened, tls_fields, write_tokens

from oarlock.client.security import add_security, security_of, security_values
from oarlock.proto.errors import InvalidArgument, PermissionDenied
from oarlock.proto.methods import METHODS, methods_of
from oarlock.proto.rate import RateLimit
from oarlock.proto.roles import ADMIN, ADMINS, LOOKERS, MEMBERS, READ, ROLES, TRAIN
from oarlock.proto.rpc import GrpcServer
from oarlock.proto.security import Security, SecuritySpec, is_local

LOCAL = (
    "127.0.0.1:1",
    "127.9.8.7:0",
    "localhost:1",
    "LOCALHOST",
    "[::1]:1",
    "::1",
    "unix:/tmp/s",
    "[::ffff:127.0.0.1]:1",
)
REMOTE = (
    "0.0.0.0:1", "[::]:1", "::", "10.0.0.1:1", "host:1", "", ":1", "*:1", "127.0.0.1.evil:1", "localhost.evil:1", "[::2]:1",
    "dns:///localhost:1", "ipv4:127.0.0.1:1", "0:1", "127.1:1", "[::ffff:10.0.0.1]:1",
)  # fmt: skip


@pytest.mark.parametrize("address", LOCAL)
def test_only_this_machine_reaches_it(address):
    assert is_local(address)
    Security().check_listen(address, "--listen")


@pytest.mark.parametrize("address", REMOTE)
def test_others_could_reach_it(address):
    assert not is_local(address)
    with pytest.raises(InvalidArgument, match=r"cannot listen on .*--token-file FILE"):
        Security().check_listen(address, "--listen")


def test_who_tells_callers_apart_may_listen_anywhere(tmp_path):
    tokens = {"token_file": write_tokens(tmp_path / "t")}
    files = tls_fields(tmp_path)
    for fields in (tokens, {**files, **tokens}, {**files, "mutual_tls": True}):
        opened(**fields).check_listen("0.0.0.0:1", "--listen")
    with pytest.raises(InvalidArgument, match="cannot listen on"):
        # Who knows the server is not known to it.
        opened(**files).check_listen("0.0.0.0:1", "--listen")


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_a_server_does_not_start_where_others_reach_it_and_nothing_tells_them_apart(listen):
    server = GrpcServer(object(), "Shard", listen=listen)
    with pytest.raises(InvalidArgument, match="cannot listen on"):
        server.start()


def test_every_method_is_somebodys():
    assert all(m.roles and m.roles <= set(ROLES) for m in METHODS.values())
    of = {role: {m.name for m in METHODS.values() if role in m.roles} for role in ROLES}
    # Who looks changes nothing and reaches no gradient; who trains does not steer the job.
    changing = ("Scale", "Stop", "Checkpoint", "Rollback", "Push", "Adopt", "Join", "Replace", "Write")
    assert {name for name in of[READ] if name.endswith(changing)} == set()
    assert methods_of("Shard")[-1].roles == MEMBERS
    assert {f"Coordinator.{n}" for n in changing[:4]} | {"Serving.Rollback"} <= of[ADMIN] - of[TRAIN]
    assert of[READ] <= of[ADMIN]
    assert {m.name for m in METHODS.values() if m.frame and m.service == "Shard"} <= of[TRAIN] - of[READ] - of[ADMIN]
    assert [m.name for m in METHODS.values() if m.changes] == ["Shard.Rows"]


def test_a_token_goes_in_the_clear_to_this_machine_alone(tmp_path):
    path = write_tokens(tmp_path / "t")
    assert opened(token_file=path).authorization(ADMINS, "127.0.0.1:1", "Coordinator.Stop").startswith("Bearer ")
    with pytest.raises(PermissionDenied, match=r"no token is sent to 10\.0\.0\.1:1 without TLS.*--tls-ca"):
        opened(token_file=path).authorization(ADMINS, "10.0.0.1:1", "Coordinator.Stop")
    for fields in ({"plaintext_tokens": True}, tls_fields(tmp_path)):
        assert opened(token_file=path, **fields).authorization(ADMINS, "10.0.0.1:1", "Coordinator.Stop")
    assert Security().authorization(ADMINS, "10.0.0.1:1", "Coordinator.Stop") is None


def test_the_token_that_may_do_the_least_is_used(tmp_path):
    both = opened(token_file=write_tokens(tmp_path / "t"))
    admin = opened(token_file=write_tokens(tmp_path / "a", f'admin = "{"abcdefghijk" * 3}"'))
    used = {roles: both.authorization(roles, "localhost:1", "m") for roles in (LOOKERS, MEMBERS, ADMINS)}
    assert len(set(used.values())) == 3
    assert admin.authorization(LOOKERS, "localhost:1", "m") == "Bearer " + "abcdefghijk" * 3
    with pytest.raises(PermissionDenied, match=r"m needs a token of role train: token file .* has none"):
        admin.authorization(MEMBERS, "localhost:1", "m")
    with pytest.raises(InvalidArgument, match="no token of read, train"):
        admin.needs(ROLES)
    both.needs(ROLES)
    Security().needs(ROLES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tls_cert": "x"}, "go together"),
        ({"tls_key": "x"}, "go together"),
        ({"mutual_tls": True}, "give tls_cert, tls_key and tls_ca"),
        ({"read_requests_per_second": -1.0}, "read_requests_per_second"),
        ({"read_requests_per_second": float("nan")}, "read_requests_per_second"),
    ],
)
def test_what_contradicts_itself_is_refused(fields, words):
    with pytest.raises(InvalidArgument, match=words):
        SecuritySpec(**fields)


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_security(parser)
    return parser.parse_args(words)


def test_options_the_environment_and_a_file_say_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path / "t")
    spec = SecuritySpec(
        **tls_fields(tmp_path), token_file=str(tmp_path / "t"), tls_name="n", mutual_tls=True, plaintext_tokens=True,
        read_requests_per_second=7.0, roots=("/a", "s3://b/c"),
    )  # fmt: skip
    assert SecuritySpec(**security_values(parsed(*spec.arguments()), {})) == spec
    values = dataclasses.asdict(spec)
    environment = {f"OARLOCK_{n.upper()}": str(v) for n, v in values.items() if n != "roots"}
    environment["OARLOCK_ROOTS"] = "/a"
    assert SecuritySpec(**security_values(parsed(), environment)) == dataclasses.replace(spec, roots=("/a",))
    # Options before the environment, that before the job's file; paths hold wherever a process is started.
    assert security_values(parsed("--token-file", "t"), environment)["token_file"] == str(tmp_path / "t")
    assert security_of(parsed("--tls-name", "m"), values).spec.tls_name == "m"
    assert SecuritySpec().arguments() == []
    for name, text in (("MUTUAL_TLS", "perhaps"), ("READ_REQUESTS_PER_SECOND", "many")):
        with pytest.raises(InvalidArgument, match=f"OARLOCK_{name}"):
            security_values(parsed(), {f"OARLOCK_{name}": text})


def test_a_rate_lets_a_seconds_worth_in_at_once_and_then_as_many_as_it_says():
    now = 100.0
    limit = RateLimit(5.0, clock=lambda: now)
    assert [limit.enter() for _ in range(7)] == [True] * 5 + [False] * 2
    now += 0.4
    assert [limit.enter() for _ in range(3)] == [True] * 2 + [False]
    now += 1000.0
    assert sum(limit.enter() for _ in range(100)) == 5
    assert all(RateLimit(0.0).enter() for _ in range(1000))
