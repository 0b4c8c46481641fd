# SPDX-License-Identifier: Apache-2.0
"""Swaps: newer cuts take the place of older ones without a failed or mixed answer; what cannot be opened changes nothing."""

import gc
import threading
import weakref

import numpy as np
import pytest
import serving_rig

from oarlock.proto.errors import NotFound, Unavailable, WrongJob
from oarlock.serving.client import Client
from oarlock.serving.swap import Serving


def first_weight(serving, keys):
    snapshot = serving.current
    out = np.empty((len(keys), 4), np.float32)
    snapshot.table("user").lookup(keys, out)
    return snapshot.version.cut, out[:, 0]


def wait_until(condition):
    pause = threading.Event()
    for _ in range(60_000):
        if condition():
            return
        pause.wait(0.001)
    pytest.fail("it did not come to that")


def test_nothing_is_served_before_a_cut_is_open(model):
    serving = Serving(model.store)
    assert not serving.ready
    with pytest.raises(Unavailable, match="still opening"):
        _ = serving.current
    serving.load()
    assert serving.ready
    assert serving.current.version.cut == 1


def test_newer_cuts_are_taken_and_the_old_one_goes(model):
    serving = Serving(model.store)
    old = weakref.ref(serving.load())
    assert not serving.look(), "there is none"
    model.cut(2)
    model.cut(5, run=1)
    assert serving.look()
    assert (serving.current.version.run, serving.current.version.cut, serving.swaps) == (1, 5, 1)
    assert (first_weight(serving, model.keys)[1] == serving_rig.value_of(5, model.keys)).all()
    gc.collect()
    assert old() is None, "its memory is given back"


def test_who_began_on_the_old_cut_ends_on_it(model):
    serving = Serving(model.store)
    mine = serving.load()
    model.cut(2)
    serving.look()
    out = np.empty((len(model.keys), 4), np.float32)
    mine.table("user").lookup(model.keys, out)
    assert (out[:, 0] == serving_rig.value_of(1, model.keys)).all()


def test_a_cut_that_cannot_be_opened_is_passed_over_and_said(model):
    serving = Serving(model.store)
    serving.load()
    model.cut(2)
    third = model.cut(3)
    (model.folder / "cut-000003" / next(e.file for e in third.blocks if e.name == "user")).unlink()
    assert serving.look()
    assert serving.current.version.cut == 2, "the newest that can be"
    model.cut(4)
    (model.folder / "cut-000004" / "manifest.json").write_bytes(b"{}")
    assert not serving.look()
    assert (serving.current.version.cut, serving.failures) == (2, 1)
    assert serving.problem.startswith("cut 4: ")
    assert not serving.look()
    assert serving.failures == 1, "it is not tried again and again"
    model.cut(5)
    assert serving.look()
    assert serving.problem == ""


def test_a_folder_that_cannot_be_read_for_the_moment_is_tried_again(model, monkeypatch):
    serving = Serving(model.store)
    serving.load()
    model.cut(2)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.store.files), "folders", lambda self: (_ for _ in ()).throw(OSError(5, "no disk")))
        assert not serving.look()
        assert "cannot be read" in serving.problem
    assert serving.look()


def test_another_job_in_the_folder_is_not_taken(model):
    serving = Serving(model.store)
    serving.load()
    serving_rig.Model(model.folder, job="f" * 32).cut(2)
    assert not serving.look()
    assert "another model needs a server of its own" in serving.problem
    with pytest.raises(WrongJob):
        serving.load(2)
    assert serving.current.version.cut == 1


def test_a_rollback_stays_until_it_is_released(model):
    serving = Serving(model.store)
    model.cut(2)
    model.cut(3)
    serving.load()
    assert serving.roll_back().version.cut == 2
    assert serving.pinned
    model.cut(4)
    assert not serving.look()
    assert serving.current.version.cut == 2
    assert serving.roll_back(1).version.cut == 1
    with pytest.raises(NotFound, match="no cut older than 1"):
        serving.roll_back()
    with pytest.raises(NotFound, match="no committed cut 9"):
        serving.roll_back(9)
    assert (serving.current.version.cut, serving.pinned) == (1, True)
    assert serving.release().version.cut == 4
    model.cut(5)
    assert serving.look()


def test_following_ends_when_it_is_closed(model):
    with_thread = Serving(model.store, look_seconds=0.001)
    with_thread.load()
    with_thread.follow()
    model.cut(2)
    wait_until(lambda: with_thread.swaps)
    with_thread.close()
    with_thread.close()
    assert with_thread.current.version.cut == 2


def test_whatever_happens_to_a_folder_it_is_followed(model, monkeypatch):
    serving = Serving(model.store, look_seconds=0.001)
    serving.load()
    said = threading.Event()

    def cuts():
        if not said.is_set():
            said.set()
            raise RuntimeError("of a library that nobody here knows")
        return [1, 2]

    monkeypatch.setattr(model.store, "cuts", cuts)
    model.cut(2)
    serving.follow()
    wait_until(lambda: serving.swaps)
    serving.close()
    assert said.is_set()
    assert (serving.current.version.cut, serving.problem) == (2, "")


def test_the_end_waits_for_no_cut_to_be_opened(model, monkeypatch):
    """Which may take minutes."""
    serving = Serving(model.store, look_seconds=0.001)
    serving.load()
    opening, over = threading.Event(), serving._over

    def endless(store, manifest, *, progress, **options):
        opening.set()
        while over.wait(60):
            progress(1, 2)

    monkeypatch.setattr("oarlock.serving.swap.open_snapshot", endless)
    model.cut(2)
    serving.follow()
    assert opening.wait(60)
    serving.close()
    assert serving.current.version.cut == 1


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
def test_swaps_under_load_fail_no_answer_and_mix_none(model, serve, frames):
    cuts = 12
    serving = Serving(model.store)
    serving.load()
    _, address = serve(serving)
    over, wrong, seen = threading.Event(), [], set()

    def ask(seed):
        rng = np.random.default_rng(seed)
        last = 0
        try:
            with Client(address, frames=frames, timeout_seconds=60) as client:
                while not over.is_set():
                    keys = rng.choice(model.keys, 64)
                    found = client.lookup({"user": keys, "item": keys})
                    cut = found.version.cut
                    seen.add(cut)
                    right = serving_rig.value_of(cut, keys)[:, None]
                    if cut < last or not (found["user"] == right).all() or not (found["item"] == right).all():
                        wrong.append((seed, last, cut))
                    last = cut
        except Exception as error:
            wrong.append((seed, error))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for cut in range(2, cuts + 1):
        wait_until(lambda before=cut - 1: wrong or before in seen)
        model.cut(cut)
        assert serving.look()
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(seen) >= cuts - 1
