# SPDX-License-Identifier: Apache-2.0
"""The store: all of a transaction or none of it, one owner, and clear words for files that are no state."""

import subprocess
import sys
from pathlib import Path

import pytest

from oarlock.cluster.store import Store
from oarlock.proto.errors import InvalidArgument, Unavailable

DIES = """
import os, sys
from pathlib import Path
from oarlock.cluster.store import Store

store = Store(Path(sys.argv[1])).open()
with store:
    store.set_fact("run", 1)
    store.set_epoch(0, {"epoch": 0})
with store:
    store.set_fact("run", 2)
    store.set_epoch(1, {"epoch": 1})
    store.set_placement(5, b"1234", [])
    if sys.argv[2] == "inside":
        os._exit(9)
os._exit(9)
"""


@pytest.mark.parametrize(("where", "run"), [("inside", 1), ("after", 2)])
def test_a_kill_leaves_all_of_a_transaction_or_nothing(tmp_path: Path, where: str, run: int) -> None:
    path = tmp_path / "state.sqlite"
    ended = subprocess.run([sys.executable, "-P", "-c", DIES, str(path), where], capture_output=True, timeout=60)
    assert ended.returncode == 9, ended.stderr.decode()
    store = Store(path).open()
    try:
        assert store.fact("run") == run
        assert store.epochs() == [{"epoch": e} for e in range(run)]
        assert (store.placement() is not None) == (where == "after")
    finally:
        store.close()


def test_an_error_inside_takes_the_transaction_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "s").open()

    def change_and_fail() -> None:
        with store:
            store.set_fact("x", 1)
            raise KeyError

    with pytest.raises(KeyError):
        change_and_fail()
    assert store.fact("x") is None
    with store:
        store.set_fact("x", [1, {"y": None}])
    store.close()
    store.close()
    again = Store(tmp_path / "s").open()
    assert again.fact("x") == [1, {"y": None}]
    again.close()
    with pytest.raises(Unavailable, match="closed"):
        again.fact("x")


def test_everything_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "s").open()
    with store:
        store.set_member((1 << 62) + 1, {"incarnation": (1 << 62) + 1})
        store.set_evaluation(1 << 40, [1.5, 1e300])
        store.set_evaluation(3, [0.1])
        store.set_placement(1, b"a", [])
        store.set_placement(2, b"b", [{"id": 0}])
    store.close()
    store = Store(tmp_path / "s").open()
    assert store.members() == [{"incarnation": (1 << 62) + 1}]
    assert store.evaluations() == {1 << 40: [1.5, 1e300], 3: [0.1]}
    assert store.placement() == (2, b"b", [{"id": 0}])
    with store:
        store.clear_evaluations()
        store.clear_epochs()
    assert store.evaluations() == {}
    assert store.fact("none", 7) == 7
    store.close()


def test_a_second_coordinator_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = Store(tmp_path / "s").open()
    with pytest.raises(Unavailable, match="another coordinator of this job is running"):
        Store(tmp_path / "s").open()
    with first:
        first.set_fact("mine", 1)
    first.close()
    second = Store(tmp_path / "s").open()
    assert second.fact("mine") == 1
    second.close()


@pytest.mark.parametrize("content", [b"this is no database, but long enough to be looked at" * 40, b"\x00" * 4096])
def test_a_file_that_is_no_state_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"state\.sqlite is no coordinator state.*--resume"):
        Store(path).open()
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="unable to open"):
        Store(tmp_path / "nowhere" / "state.sqlite").open()


def test_after_a_failed_write_nothing_is_answered(tmp_path: Path) -> None:
    """What the coordinator remembers is then ahead of the disk: it must not tell."""
    store = Store(tmp_path / "s").open()
    with store:
        store.set_fact("kept", "x")
    assert store._db is not None
    store._db.execute("PRAGMA max_page_count = 1")  # as a full disk does
    store.check()
    with pytest.raises(Unavailable, match=r"cannot be written.*full.*--resume"), store:
        store.set_fact("kept", "y" * 100_000)
    for use in (store.check, store.members, lambda: store.fact("kept"), store.__enter__):
        with pytest.raises(Unavailable, match="cannot be written"):
            use()
    store.close()
    again = Store(tmp_path / "s").open()
    assert again.fact("kept") == "x"
    again.close()


def test_a_damaged_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = Store(path).open()
    with store:
        for i in range(2000):
            store.set_evaluation(i, [float(i)] * 10)
    store.close()
    data = bytearray(path.read_bytes())
    for page in range(4096, len(data) - 4096, 4096):
        data[page : page + 200] = b"\xff" * 200
    path.write_bytes(data)
    try:
        damaged = Store(path).open()
    except InvalidArgument as error:
        assert "is no coordinator state" in str(error)  # noqa: PT017
        return
    with pytest.raises(Unavailable, match=r"malformed.*--resume"):
        damaged.evaluations()
    damaged.close()
