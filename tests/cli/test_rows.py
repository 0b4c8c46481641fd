# SPDX-License-Identifier: Apache-2.0
"""`oarlock rows`: what is shown, written and refused, over the wire of a shard that serves while the command asks."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.cli import rows as cli_rows
from oarlock.client.entry import write_address
from oarlock.client.router import ShardAddress
from oarlock.client.rows import RowsPart
from oarlock.embedding.spec import TableSpec
from oarlock.export import rows_file
from oarlock.launch.folder import read_spec
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.rpc import GrpcServer
from oarlock.ps import rows as shard_rows
from tests.conftest import load_shared

rig, rows_rig = load_shared("client/rig.py"), load_shared("client/rows_rig.py")

Oarlock = Callable[..., Any]
RUN = "import sys; from oarlock.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def job() -> Iterator[Any]:
    """A job of one shard that has seen three groups; its coordinator is at ``job.at``."""
    made = rig.Job(rig.spec_of(tables=rows_rig.TABLES), shards=1)
    shard = GrpcServer(made.services[0], "Shard", listen="127.0.0.1:0", threads=4)
    made.addresses[0] = ShardAddress(0, shard.start(), 100)
    made.place()
    coordinator = GrpcServer(rows_rig.Coordinator(made), "Coordinator", listen="127.0.0.1:0", threads=4)
    made.at = coordinator.start()
    for group in range(3):
        rows_rig.train(made, group)
    try:
        yield made
    finally:
        coordinator.stop()
        shard.stop()


def test_get_shows_rows_and_those_that_are_none(oarlock: Oarlock, job: Any) -> None:
    ended = oarlock("rows", "get", job.at, "user", "7", "0xff", "7", "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert [(r["key"], r["present"]) for r in found["rows"]] == [(7, True), (255, False)]
    weights = np.array([r["weights"] for r in found["rows"]], np.float32)
    assert np.array_equal(weights, job.rows("user", [7, 255]))
    lines = oarlock("rows", "get", job.at, "user", "7", "0xff").out.splitlines()
    assert [line.split()[1:4:2] for line in lines if "yes" in line or " no " in line] == [["7", "yes"], ["255", "no"]]


def test_keys_come_from_standard_input(oarlock: Oarlock, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("3 0x4\n\n18446744073709551615\n3"))
    found = json.loads(oarlock("rows", "get", job.at, "user", "9", "-", "--json").out)
    assert [r["key"] for r in found["rows"]] == [9, 3, 4, (1 << 64) - 1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("3 four"))
    assert "standard input: 'four' is no key" in oarlock("rows", "get", job.at, "user", "-").line
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert "standard input holds no key" in oarlock("rows", "get", job.at, "user", "-").line
    monkeypatch.setattr(cli_rows, "MAX_KEYS", 2)
    assert "more than 2 keys" in oarlock("rows", "get", job.at, "user", "1", "2", "3").line


def test_explain_says_all_that_the_table_knows(oarlock: Oarlock, job: Any) -> None:
    found = json.loads(oarlock("rows", "explain", job.at, "user", "7", "99", "--json").out)
    there, absent = found["rows"]
    table = job.shards[0].tables[0]
    for facts in (there, absent):
        known = table.explain(facts["key"], tick=found["step"])
        assert {name: facts[name] for name in known} == json.loads(json.dumps(known))
    assert (there["shard"], there["address"], there["generation"]) == (0, job.addresses[0].address, 1)
    assert (there["version"], there["present"], absent["present"]) == (3, True, False)
    shown = oarlock("rows", "explain", job.at, "user", "7").out
    for name in ("block", "undo kept", "eviction.age.limit", "last update", job.addresses[0].address):
        assert name in shown, name


def exported(path: Path) -> dict[int, tuple[list[float], list[float]]]:
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path.read_bytes()).read_all()
    columns = (table[name].to_pylist() for name in ("key", "weights", "state"))
    return {key: (weights, state) for key, weights, state in zip(*columns, strict=True)}


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_an_export_is_the_table(
    oarlock: Oarlock, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(shard_rows, "PAGE_BYTES", 100)
    monkeypatch.setattr(rows_file, "GROUP_BYTES", 200)
    ended = oarlock("rows", "export", job.at, "user", "--all", "--out", name, "--json")
    assert (ended.code, json.loads(ended.out)["rows"]) == (0, 40)
    found = exported(tmp_path / name)
    assert sorted(found) == list(range(40))
    assert all(found[k][0] == row.tolist() for k, row in enumerate(job.rows("user", range(40))))
    content = [job.shards[0].tables[0].export_block(block) for block in range(8)]
    states = {k: s.tolist() for c in content for k, s in zip(c.keys.tolist(), c.state, strict=True)}
    assert {k: state for k, (_, state) in found.items()} == states
    if name.endswith(".parquet"):
        file = pq.ParquetFile(name)
        assert file.num_row_groups > 1
        assert file.schema_arrow.names == ["key", "weights", "state", "last_update"]
        facts = json.loads(file.schema_arrow.metadata[b"oarlock"])
        assert (facts["run"], facts["table"]["name"], facts["table"]["dim"]) == (1, "user", 2)
        file.close()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_an_export_of_keys_and_of_nothing(oarlock: Oarlock, job: Any, tmp_path: Path) -> None:
    ended = oarlock("rows", "export", job.at, "user", "3", "5", "99", "--out", "a.parquet")
    assert ended.out.startswith("a.parquet: 2 rows of user, 1 keys have none, ")
    assert sorted(exported(tmp_path / "a.parquet")) == [3, 5]
    assert oarlock("rows", "export", job.at, "item", "--all", "--out", "b.parquet").code == 0
    assert exported(tmp_path / "b.parquet") == {}


def test_an_export_replaces_nothing_unless_told_and_leaves_nothing_half_done(
    oarlock: Oarlock, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_text("mine")
    assert "a.parquet is there already" in oarlock("rows", "export", job.at, "user", "1", "--out", "a.parquet").line
    assert (tmp_path / "a.parquet").read_text() == "mine"
    assert oarlock("rows", "export", job.at, "user", "1", "--out", "a.parquet", "--force").code == 0
    assert list(exported(tmp_path / "a.parquet")) == [1]
    before = (tmp_path / "a.parquet").read_bytes()
    job.services[0].rows = None
    assert oarlock("rows", "export", job.at, "user", "1", "--out", "a.parquet", "--force").code == 1
    assert oarlock("rows", "export", job.at, "user", "1", "--out", "b.parquet").code == 1
    assert (tmp_path / "a.parquet").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    empty = np.empty((0, 2), np.float32)
    file = rows_file.RowsFile(path, TableSpec("t", 2), {}, force=False)
    file.__enter__()
    file.write(RowsPart(np.empty(0, np.uint64), empty, empty, np.empty((0, 0), np.uint32)))
    path.write_text("mine")
    with pytest.raises(InvalidArgument, match="is there by now"):
        file.__exit__(None, None, None)
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a.arrow"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_undo_asks_first(oarlock: Oarlock, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = job.shards[0].tables[0]
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    ended = oarlock("rows", "undo", job.at, "user", "7", "99", "--steps", "2")
    assert ended.code == 1
    question = "take back the last 2 updates of 2 keys of user while test trains? [y/N] "
    assert ended.err == question + "oarlock: nothing was taken back\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "nobody can be asked here: add --yes" in oarlock("rows", "undo", job.at, "user", "7").line
    assert "nobody can be asked there: add --yes" in oarlock("rows", "undo", job.at, "user", "-").line
    assert table.explain(7)["undo_kept"] == 3
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert oarlock("rows", "undo", job.at, "user", "7", "99").code == 0
    assert table.explain(7)["undo_kept"] == 2
    ended = oarlock("rows", "undo", job.at, "user", "7", "99", "--yes", "--json", "--steps", "3")
    assert json.loads(ended.out)["rows"] == [{"key": 7, "undone": 2}, {"key": 99, "undone": 0}]
    assert np.array_equal(job.rows("user", [7]), rows_rig.job_of().rows("user", [7]))


def test_quarantine_counts_by_table(oarlock: Oarlock, job: Any) -> None:
    rows_rig.train(job, 3, raw=[5, 6], value=float("nan"))
    found = json.loads(oarlock("rows", "quarantine", job.at, "--json").out)
    assert found["tables"] == {"user": {"refused": 2, "sample": [5, 6]}, "item": {"refused": 0, "sample": []}}
    shown = oarlock("rows", "quarantine", job.at, "user").out
    assert "5 6" in shown
    assert "item" not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["get", "JOB", "usr", "1"], 1, "has no table 'usr': did you mean 'user'? it has user, item"),
        (["get", "JOB", "user", "-5"], 2, "'-5' is no key: give an integer from 0 to 2^64 - 1"),
        (["get", "JOB", "user", "18446744073709551616"], 2, "is no key: it is over 2^64 - 1"),
        (["get", "JOB", "user", "9" * 5000], 2, "is no key"),
        (["get", "JOB", "user"], 2, "required: KEY"),
        (["export", "JOB", "user", "1"], 2, "required: --out"),
        (["export", "JOB", "user", "--out", "a.parquet"], 1, "give either the keys to export, or --all"),
        (["export", "JOB", "user", "1", "--all", "--out", "a.parquet"], 1, "give either the keys to export, or --all"),
        (["export", "JOB", "user", "1", "--out", "a.csv"], 1, "give a file that ends in .parquet or .arrow"),
        (["export", "JOB", "user", "1", "--out", "gone/a.parquet"], 1, "gone"),
        (["undo", "JOB", "item", "1", "--yes"], 1, "table item keeps no old values"),
        (["undo", "JOB", "user", "1", "--yes", "--steps", "4"], 1, "keeps 3 old values of a row; give 1 to 3"),
        (["undo", "JOB", "user", "1", "--yes", "--steps", "0"], 1, "give 1 to 3"),
        (["get", "nobody", "user", "1"], 1, "no job 'nobody'"),
        (["get", "127.0.0.1:1", "user", "1"], 1, "127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_one_line(oarlock: Oarlock, job: Any, arguments: list[str], code: int, words: str) -> None:
    before = rig.state(job)
    ended = oarlock("rows", *(job.at if a == "JOB" else a for a in arguments))
    assert (ended.code, ended.out) == (code, "")
    assert words in ended.line
    assert rig.state(job) == before


def test_a_job_that_does_not_run_or_has_no_address(
    oarlock: Oarlock, train: Oarlock, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--epochs", "1", "--name", "a", "--seed", "1").code == 0
    assert "job a is not running" in oarlock("rows", "get", "a", "user", "1").line
    # Another job at its old address is not asked in its place.
    assert read_spec(Path("runs/a")).job != job.spec.job
    write_address(Path("runs/a"), job.at)
    assert "job a is not running" in oarlock("rows", "get", "a", "user", "1").line
    monkeypatch.setattr(cli_rows, "is_running", lambda folder: True)
    assert "runs in one process and has no address" in oarlock("rows", "get", "a", "user", "1").line


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_rows_of_real_processes(data: Path, tmp_path: Path) -> None:
    """A job trains while it is asked; an export is its table; then it is stopped."""

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-P", "-c", RUN, *arguments]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)

    given = ["--data", str(data), "--name", "a", "--epochs", "100000", "--reader", "arrow", "--workers", "1"]
    training = subprocess.Popen(
        [sys.executable, "-P", "-c", RUN, "train", "ncf", *given],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Where no kernel was ever compiled, that comes first.
        end = time.monotonic() + 300
        while True:
            ended = command("rows", "explain", "a", "user", "1", "--json")
            if ended.returncode == 0 and json.loads(ended.stdout)["rows"][0]["present"]:
                break
            assert time.monotonic() < end, ended.stderr
        facts = json.loads(ended.stdout)["rows"][0]
        assert facts["version"] >= 1
        ended = command("rows", "export", "a", "user", "--all", "--out", "u.parquet", "--json")
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["rows"] == len(exported(tmp_path / "u.parquet")) <= 100
        ended = command("rows", "undo", "a", "user", "1", "--yes")
        assert "keeps no old values" in ended.stderr
        assert command("stop", "a").returncode == 0
        assert training.wait(60) == 130
    finally:
        training.terminate()
        training.wait(60)
