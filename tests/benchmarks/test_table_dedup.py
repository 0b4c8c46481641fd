# SPDX-License-Identifier: Apache-2.0
"""The comparison with numpy.unique and torch.unique: what it says where there is no environment, and that peers do their work."""

import sys

import numpy as np
import pytest

from oarlock.benchmarks import table_dedup
from oarlock.benchmarks.table_dedup import SETS, Case, KeySource, Peer, interpreter


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(table_dedup, "HEADLINE", (Case("uniform", 500, 8), Case("zipf", 500, 8)))
    monkeypatch.setattr(table_dedup, "IDS", 2_000)


@pytest.fixture
def peer():
    one = Peer("numpy", sys.executable)
    yield one
    one.close()


def test_a_missing_environment_is_told_and_numpy_is_the_one_beside(small, monkeypatch, tmp_path):
    monkeypatch.setattr(table_dedup, "CHECKOUT", tmp_path)
    monkeypatch.setattr(table_dedup.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    result = table_dedup.measure(quick=True)
    assert result["numpy"] == np.__version__
    assert "make test-modern" in result["why"]["numpy"]
    assert result["torch"] is None
    assert result["dedup_vs_torch"] is None
    assert "make setup-torch" in result["why"]["torch"]
    unique = result["cases"][:2]
    assert [case["case"] for case in unique] == ["unique, uniform", "unique, zipf"]
    assert result["dedup_vs_numpy"] == min(case["vs_numpy"] for case in unique)
    assert unique[1]["distinct"] < unique[0]["distinct"] < 500
    assert all(case["vs_other"] > 0 for case in result["cases"][2:])


def test_a_peer_that_cannot_begin_is_told(small, monkeypatch, tmp_path):
    python = tmp_path / ".venv-modern" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(table_dedup, "CHECKOUT", tmp_path)
    monkeypatch.setattr(table_dedup.importlib.util, "find_spec", lambda name: None)
    result = table_dedup.measure(quick=True)
    assert result["numpy"] is None
    assert result["dedup_vs_numpy"] is None
    assert "has ended" in result["why"]["numpy"]


def test_the_environment_made_for_a_package_is_asked_first(monkeypatch, tmp_path):
    python = tmp_path / ".venv-torch" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(table_dedup, "CHECKOUT", tmp_path)
    assert interpreter("torch") == (str(python), None)


def test_a_peer_answers_for_each_set_that_it_was_asked_about(peer):
    peer.start()
    assert peer.version() == np.__version__
    for case in (Case("uniform", 40), Case("uniform", 3000)):
        peer.feed(KeySource().make(case))
        spent = peer.time([0, SETS - 1, 5])
        assert len(spent) == 3
        assert all(0 < seconds < 10 for seconds in spent)


def test_the_keys_are_those_of_their_law():
    source = KeySource()
    uniform, zipf, spread = (source.make(Case(kind, 20_000)) for kind in ("uniform", "zipf", "zipf spread"))
    assert max(keys.max() for keys in uniform) < table_dedup.IDS
    assert max(keys.max() for keys in zipf) < table_dedup.IDS
    # The harmonic sum: 10 M ids at 1.05 give the first one a share of 1 / 11.6.
    shares = np.arange(1, table_dedup.IDS + 1, dtype=np.float64) ** -table_dedup.EXPONENT
    share = float(np.mean([(keys == 0).mean() for keys in zipf]))
    assert share == pytest.approx(1 / shares.sum(), rel=0.05)
    for plain, wide in zip(zipf, spread, strict=True):
        assert len(np.unique(plain)) == len(np.unique(wide))
    assert [keys.tobytes() for keys in source.make(Case("zipf", 20_000))] == [keys.tobytes() for keys in zipf]
