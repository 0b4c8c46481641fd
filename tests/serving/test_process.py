# SPDX-License-Identifier: Apache-2.0
"""`oarlock serve` as people run it: a process that says where it is and when it is ready, follows cuts, goes back, and drains."""

import json
import re
import signal
import time
import urllib.request

import numpy as np
import pytest
import serving_rig
from process_rig import Process

from oarlock.checkpoint.store import LocalStore
from oarlock.cli.main import main
from oarlock.serving import Client
from oarlock.serving.process import Settings, run

pytestmark = pytest.mark.slow
SECONDS = 120.0


def until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.01)


def test_it_serves_follows_goes_back_and_drains(model, capsys):
    with Process(model.folder, "--follow-cuts", "--metrics-port", 0, "--drain-seconds", 0.5) as server:
        assert re.fullmatch(r"listening at 127\.0\.0\.1:\d+, metrics at http://\S+/metrics", server.lines[0])
        assert server.lines[1].startswith("ready: cut 1 of run 0, 2 tables, 400 rows")
        with Client(server.address, timeout_seconds=SECONDS) as client:

            def cut():
                found = client.lookup({"user": model.keys})
                assert (found["user"] == serving_rig.value_of(found.version.cut, model.keys)[:, None]).all()
                return found.version.cut

            assert cut() == 1
            model.cut(2)
            until(lambda: cut() == 2)
            assert main(["serve", "rollback", server.address]) == 0
            assert cut() == 1
            assert main(["serve", "status", "--json", server.address]) == 0
            told = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert (told["cut"], told["pinned"], told["cuts"], told["problem"]) == (1, True, [1, 2], "")
            assert main(["serve", "rollback", server.address, "--newest"]) == 0
            assert cut() == 2
            assert main(["serve", "rollback", server.address, "--cut", "9"]) == 1
            assert "no committed cut 9" in capsys.readouterr().err
            page = urllib.request.urlopen(server.lines[0].partition("metrics at ")[2], timeout=SECONDS).read().decode()
            assert "oarlock_serving_cut 2\n" in page
            assert 'oarlock_rpc_server_requests_total{method="Serving.Lookup"}' in page
            code, said = server.end()
            assert code == 0
            assert not re.search("Traceback|[Ee]rror", said), said


def test_what_cannot_be_served_is_said_in_one_line(model, tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 1
    assert "no checkpoint in" in capsys.readouterr().err
    assert main(["serve", f"{model.folder}@7"]) == 1
    assert "no committed cut 7" in capsys.readouterr().err
    assert main(["serve", str(model.folder), "--listen", "nowhere"]) == 1
    assert "cannot listen on 'nowhere'" in capsys.readouterr().err
    assert main(["serve", "status", "127.0.0.1:1"]) == 1
    assert "not answered in time" in capsys.readouterr().err


def test_a_signal_ends_it_while_the_model_is_being_opened(model):
    store = LocalStore(model.folder)
    said = []

    def progress(done, total):
        said.append(done)
        signal.raise_signal(signal.SIGTERM)

    run(store, Settings(), progress=progress, ready=lambda serving: said.append("ready"))
    assert len(said) == 1, "the second block is not begun"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_memory_of_old_cuts_is_given_back(tmp_path):
    """Twenty swaps of a model of 25 MB leave no more than a model behind."""
    model = serving_rig.Model(tmp_path / "c", specs=(serving_rig.TableSpec("user", 64, blocks=4),))
    model.keys = np.arange(90_000, dtype=np.uint64)
    model.cut(1)
    with Process(model.folder, "--follow-cuts") as server, Client(server.address, timeout_seconds=SECONDS) as client:

        def resident():
            with open(f"/proc/{server.process.pid}/status", encoding="ascii") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) // 1024

        def mapped():
            with open(f"/proc/{server.process.pid}/maps", encoding="ascii") as file:
                return sum(".arrow" in line for line in file)

        before = None
        for cut in range(2, 22):
            model.cut(cut)
            until(lambda cut=cut: client.lookup({"user": [5]}).version.cut == cut)
            if cut == 4:
                before = resident()
        assert mapped() == 4, "the files of one cut"
        assert resident() < before + 30
        assert server.end(signal.SIGINT)[0] == 0
