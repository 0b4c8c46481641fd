# SPDX-License-Identifier: Apache-2.0
"""A whole job with tokens and mutual TLS: it trains, its ports answer nobody else, and its secrets are nowhere to be found."""

import asyncio
import http.client
import json
import os
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from security_rig import Authority, bearer, opened, paths_of, raw, texts_of, tls_fields, write_tokens

from oarlock.client.entry import read_address
from oarlock.launch.config import to_toml
from oarlock.launch.folder import read_run, stored_security
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.coordinator_pb2 import RollbackRequest
from oarlock.proto.errors import InvalidArgument, PermissionDenied
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.rpc.health import CHECK
from oarlock.proto.security import Security, SecuritySpec

UNKNOWN = grpc.StatusCode.UNAUTHENTICATED


def test_a_job_keeps_the_paths_of_its_secrets(start: Any, tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens")
    _, folder = start(security={"token_file": str(path), "roots": ["/a", "s3://b/c"], "read_requests_per_second": 5})
    run = read_run(folder)
    assert run.security_spec() == SecuritySpec(
        token_file=str(path), roots=("/a", "s3://b/c"), read_requests_per_second=5.0
    )
    assert stored_security(folder)["token_file"] == str(path)
    texts = texts_of(path).values()
    for file in folder.rglob("*"):
        assert file.is_dir() or not any(text in file.read_text() for text in texts)
    assert "token_file" in to_toml(run, {})


@pytest.mark.parametrize(
    ("security", "words"),
    [
        ({"tokn_file": "x"}, "unknown field 'tokn_file'; did you mean 'token_file'"),
        ({"token_file": 3}, "give a string"),
        ({"mutual_tls": True}, "give tls_cert"),
        ({"roots": "x"}, "a list"),
    ],
)
def test_a_job_file_says_what_is_wrong(run_of: Any, security: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        run_of(security=security)


def test_a_launcher_needs_a_token_of_each_role(start: Any, tmp_path: Path) -> None:
    spec, folder = start()
    path = write_tokens(tmp_path / "t", f'train = "{"abcdefghijk" * 3}"')
    with pytest.raises(InvalidArgument, match="no token of read, admin"):
        LocalProcesses(spec, folder, security=Security(SecuritySpec(token_file=str(path))).open())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("oarlock.cluster", ["--dir", ".", "--listen", "0.0.0.0:0"]),
        ("oarlock.cluster", ["--dir", ".", "--metrics-port", "0", "--metrics-host", "0.0.0.0"]),
        ("oarlock.ps", ["--coordinator", "127.0.0.1:1", "--listen", "[::]:0"]),
        ("oarlock.ps", ["--coordinator", "127.0.0.1:1", "--metrics-port", "0", "--metrics-host", "0.0.0.0"]),
        ("oarlock.worker", ["--coordinator", "127.0.0.1:1", "--metrics-port", "0", "--metrics-host", "0.0.0.0"]),
    ],
)
def test_a_process_that_others_could_reach_does_not_start_without_security(
    module: str, arguments: list[str], start: Any
) -> None:
    _, folder = start()
    command = [sys.executable, "-P", "-m", module, *arguments]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("OARLOCK_")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, cwd=folder, env=environment
    )
    assert done.returncode in (1, 2)
    assert "cannot listen on" in done.stderr
    assert "--token-file FILE" in done.stderr
    assert "Traceback" not in done.stderr


def page(address: str, path: str, context: ssl.SSLContext, headers: Any = ()) -> int:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=20, context=context)
    try:
        connection.request("GET", path, headers=dict(headers))
        return connection.getresponse().status
    finally:
        connection.close()


class Intruder:
    """Looks, in the midst of a job, at all that can be seen of its processes from outside."""

    def __init__(self, folder: Path, fields: dict[str, str], secrets: list[str]) -> None:
        self.folder, self.fields, self.secrets = folder, fields, secrets
        self.launched: LocalProcesses
        self.done = False
        self.pages: dict[str, int] = {}
        self.denied: dict[str, int] = {}

    def look(self, status: dict[str, Any]) -> None:
        members = status["members"]
        roles = {m["role"] for m in members if m["stats"].get("metrics")}
        if self.done or roles != {"shard", "worker"} or status["phase"] != "training" or not status.get("metrics"):
            return
        self.done = True
        files = [Path(self.fields[name]).read_bytes() for name in ("tls_ca", "tls_key", "tls_cert")]
        with_certificate = grpc.ssl_channel_credentials(*files)
        addresses = {
            "Coordinator": [read_address(self.folder)],
            "Shard": [m["address"] for m in members if m["address"]],
        }
        for service, all_of_it in addresses.items():
            for address in all_of_it:
                with grpc.secure_channel(address, with_certificate) as channel:
                    assert raw(channel, CHECK)[0] is grpc.StatusCode.OK
                    for _, path in paths_of(service):
                        for metadata in ((), bearer("x" * 43)):
                            found = raw(channel, path, metadata)
                            assert found == (UNKNOWN, []), (service, path, found)
                            self.denied[service] = self.denied.get(service, 0) + 1
                for insecure in (grpc.insecure_channel(address), grpc.secure_channel(
                    address, grpc.ssl_channel_credentials(files[0])
                )):  # fmt: skip
                    with insecure as channel:
                        # Who shows no certificate does not get as far as a question.
                        assert raw(channel, CHECK)[0] is grpc.StatusCode.UNAVAILABLE
        context = ssl.create_default_context(cafile=self.fields["tls_ca"])
        told = [status["metrics"], *(m["stats"]["metrics"] for m in members if m["stats"].get("metrics"))]
        for address in told:
            for path in ("/metrics", "/", "/debug"):
                assert page(address, path, context) == 401, address
            assert page(address, "/healthz", context) == 200
            good = page(address, "/metrics", context, bearer_header(self.secrets[0]))
            assert good == 200
            self.pages[address] = good
        for child in self.launched.children:
            for name in ("cmdline", "environ"):
                seen = Path(f"/proc/{child.process.pid}/{name}").read_bytes()
                assert not any(secret.encode() in seen for secret in self.secrets), (child.role, name)


def bearer_header(text: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {text}")]


@pytest.mark.slow
def test_a_job_with_tokens_and_mutual_tls_trains_and_keeps_its_secrets(start: Any, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    path = write_tokens(tmp_path / "tokens")
    fields = {**tls_fields(tmp_path, authority), "token_file": str(path)}
    texts = texts_of(path)
    key = (tmp_path / "server.key").read_text().splitlines()
    secrets = [texts["read"], texts["train"], texts["admin"], key[1], key[2]]
    spec, folder = start(security={**fields, "mutual_tls": True}, epochs=1000, workers=2)
    security = Security(read_run(folder).security_spec()).open()
    intruder = Intruder(folder, fields, secrets)
    launched = LocalProcesses(spec, folder, log_level="debug", metrics_port=0, security=security)
    intruder.launched = launched

    def watch(status: dict[str, Any]) -> bool:
        if status:
            intruder.look(status)
        return not (intruder.done and status["history"])

    status = asyncio.run(launched.run(watch, 0.05))
    assert (status["phase"], status["reason"]) == ("stopped", "interrupted")
    assert status["history"]
    assert status["checkpoints"]
    assert len(intruder.pages) == 1 + spec.servers + spec.workers
    assert set(intruder.denied) == {"Coordinator", "Shard"}
    looked = 0
    for file in folder.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not any(secret.encode() in data for secret in secrets), file
            looked += 1
    assert looked > 10
    logs = "".join(p.read_text() for p in (folder / "logs").iterdir())
    assert "event=call_denied reason=token" in logs


@pytest.mark.slow
def test_commands_find_the_tokens_of_a_job_in_its_folder_and_do_what_their_role_may(start: Any, tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens")
    looker = write_tokens(tmp_path / "read", f'read = "{texts_of(path)["read"]}"')
    stranger = write_tokens(tmp_path / "stranger")
    spec, folder = start(security={"token_file": str(path)}, epochs=1000, workers=1)
    job = str(folder)
    launched = LocalProcesses(spec, folder, security=opened(token_file=path))
    said: dict[str, Any] = {}
    training = asyncio.Event()
    plain = {n: v for n, v in os.environ.items() if not n.startswith("OARLOCK_")}

    async def command(*words: str, **variables: str) -> tuple[int, str]:
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "oarlock.cli.main", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**plain, **variables},
        )
        out, _ = await run.communicate()
        assert run.returncode is not None
        return run.returncode, out.decode()

    async def commands() -> None:
        await training.wait()
        address = read_address(folder)
        said["own"] = await command("status", job, "--json")
        said["address alone"] = await command("status", address)
        said["stranger"] = await command("status", job, "--token-file", str(stranger))
        said["looker"] = await command("status", address, "--json", OARLOCK_TOKEN_FILE=str(looker))
        said["looker stops"] = await command("stop", address, "--token-file", str(looker))
        transport = GrpcTransport(security=opened(token_file=path))
        request = RollbackRequest(table=spec.tables[0].name, path=f"{tmp_path}/elsewhere/checkpoints@1")
        # Whatever an admin asks for is below the job's roots.
        with pytest.raises(PermissionDenied, match="below none of the roots"):
            await transport.call(address, "Coordinator.Rollback", request, timeout_seconds=10)
        await transport.close()
        said["stop"] = await command("stop", job, "--no-checkpoint")

    def watch(status: dict[str, Any]) -> bool:
        if status and status["phase"] == "training":
            training.set()
        return True

    async def both() -> dict[str, Any]:
        async with asyncio.TaskGroup() as group:
            run = group.create_task(launched.run(watch, 0.05))
            group.create_task(commands())
        return run.result()

    status = asyncio.run(both())
    assert status["phase"] == "stopped"
    assert json.loads(said["own"][1])["phase"] == "training"
    assert said["looker"][0] == 0, said["looker"]
    for name in ("address alone", "stranger"):
        assert said[name][0] == 1, name
        assert "answers those who give a token of its job" in said[name][1]
    assert said["looker stops"][0] == 1
    assert "Coordinator.Stop needs a token of role admin" in said["looker stops"][1]
    assert said["stop"][0] == 0
