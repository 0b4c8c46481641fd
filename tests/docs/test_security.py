# SPDX-License-Identifier: Apache-2.0
"""docs/security.md: every test that a threat names is there, roles and options are those of the code, limits too."""

import dataclasses
import re
from pathlib import Path

import pytest

from oarlock.proto.methods import INFERENCE, METHODS, methods_of
from oarlock.proto.roles import ADMIN, READ, ROLES, TRAIN
from oarlock.proto.rpc import server
from oarlock.proto.security import READ_REQUESTS_PER_SECOND, SecuritySpec, option_of
from oarlock.ps import changes, feed
from oarlock.ps.rows import MAX_KEYS
from oarlock.serving import http_server
from oarlock.telemetry import prometheus

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[str]]:
    found = re.search(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert found is not None, first
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[1].splitlines()]


@pytest.mark.parametrize(("threat", "holds", "tests"), table("threat"))
def test_every_threat_has_its_tests(threat: str, holds: str, tests: str) -> None:
    assert threat
    assert holds
    named = re.findall(r"`(tests/[^`]+)`", tests)
    assert named
    for each in named:
        path, _, function = each.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not function or re.search(rf"^(async )?def {function}\(", source, re.MULTILINE), each


def test_the_roles_are_those_of_the_methods() -> None:
    rows = {row[0].strip("`"): row[2] for row in table("role")}
    assert tuple(rows) == ROLES
    of = {role: {m.name for m in METHODS.values() if role in m.roles} for role in ROLES}
    assert set(re.findall(r"`(\w+\.\w+)`", rows[READ])) == of[READ]
    assert {service for service in ("Shard", "Serving") if READ in methods_of(service)[-1].roles} == {"Serving"}
    inference = {m for m in METHODS if m.startswith(f"{INFERENCE}.")}
    assert inference <= of[READ]
    rows[TRAIN] = rows[TRAIN].replace(f", those of `{INFERENCE}`", "")
    shard = {m for m in METHODS if m.startswith("Shard.")} - {"Shard.Stats", "Shard.Rows", "Shard.Changes"}
    named = {f"Coordinator.{n}" for n in re.findall(r"`(?:Coordinator\.)?([A-Z]\w+)`", rows[TRAIN])}
    lookups = set(re.findall(r"`(Serving\.\w+)`", rows[TRAIN]))
    assert of[TRAIN] - inference == shard | {"Wire.Sockets"} | lookups | named - {
        "Coordinator.Stats",
        "Coordinator.Rows",
        "Coordinator.Changes",
    }
    more = {f"Coordinator.{n}" for n in ("Scale", "Checkpoint", "Rollback", "Stop")} | {"Serving.Rollback"}
    assert all(n.split(".")[1] in rows[ADMIN] for n in more)
    assert "`Serving.Rollback`" in rows[ADMIN]
    assert of[ADMIN] == of[READ] | more


def test_the_options_are_those_of_the_spec() -> None:
    fields = [f.name for f in dataclasses.fields(SecuritySpec)]
    assert [[c.strip("`") for c in row[:3]] for row in table("option")] == [
        [option_of(name), name, f"OARLOCK_{name.upper()}"] for name in fields
    ]


def test_the_limits_are_those_of_the_code() -> None:
    limits = {row[0]: row[1] for row in table("what")}
    assert limits["keys in one `Rows`"] == str(MAX_KEYS)
    of_followers = "bytes of one `Changes`; of whole blocks a second; of changes kept; keys noted"
    mebibytes = [n >> 20 for n in (changes.ANSWER_BYTES, changes.WHOLE_BYTES_PER_SECOND, feed.RING_BYTES)]
    assert limits[of_followers] == "about {} MiB; {} MiB; {} MiB; {}".format(*mebibytes, feed.NOTED_KEYS)
    assert (
        limits["requests a second of role `read`"]
        == f"{READ_REQUESTS_PER_SECOND:g} (look-ups and inferences not counted)"
    )
    assert limits["connections of gRPC"].endswith(str(server.MAX_CONNECTIONS))
    http = f"{prometheus.MAX_CONNECTIONS}; {prometheus.HEAD_BYTES}; {prometheus.SECONDS:g}"
    assert limits["HTTP connections; bytes of a request; seconds of a connection"] == http
    serving = (http_server.MAX_CONNECTIONS, http_server.HEAD_BYTES, http_server.MAX_BODY_BYTES, http_server.SECONDS)
    found = limits["of `oarlock serve --http`: connections; bytes of a head; of a body; seconds"]
    assert found == "; ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in serving)
