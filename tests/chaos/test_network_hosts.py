# SPDX-License-Identifier: Apache-2.0
"""The hosts that the tests of networks run on: links do what their rules say, and nothing is left of processes that are gone."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from network_hosts import NAME, Hosts, _ip, lacking, remove_leftovers
from network_switch import CUT, LOST, SEEN, Rule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Sends numbered datagrams to the address that it is given, half a millisecond apart.
SEND = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    for n in range(int(sys.argv[2])):
        s.sendto(b"%d" % n, (sys.argv[1], 5000))
        time.sleep(0.0005)
"""
# Prints what comes, until it is told to end.
RECEIVE = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("0.0.0.0", 5000))
    print("ready", flush=True)
    while True:
        came = s.recv(100)
        if came == b"end":
            break
        print(came.decode(), flush=True)
"""
MANY = 400


@pytest.fixture(scope="module")
def privilege() -> None:
    if missing := lacking():
        pytest.skip(f"network namespaces cannot be made here: {missing}")


@pytest.fixture
def hosts(privilege: None, seed: int) -> Iterator[Hosts]:
    with Hosts(["a", "b", "c"], seed=seed) as made:
        yield made


def sent(hosts: Hosts, a: str, b: str, many: int = MANY) -> tuple[list[int], float]:
    """Return which datagrams from host ``a`` came to ``b``, in that order, and how long all took."""
    receive = hosts.command(b, [sys.executable, "-c", RECEIVE])
    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiving:
        assert receiving.stdout is not None
        assert receiving.stdout.readline() == "ready\n"
        begun = time.monotonic()
        subprocess.run(hosts.command(a, [sys.executable, "-c", SEND, hosts.address(b), str(many)]), check=True)
        end = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'end', ('127.0.0.1', 5000))"
        # Behind the last one, however late it comes.
        while hosts.switch.waiting:
            os.sched_yield()
        subprocess.run(hosts.command(b, [sys.executable, "-W", "ignore", "-c", end]), check=True)
        return [int(line) for line in receiving.stdout], time.monotonic() - begun


def test_links_obey_their_rules(hosts: Hosts) -> None:
    everything = list(range(MANY))
    assert sent(hosts, "a", "b")[0] == everything
    hosts.link("a", "b", Rule(cut=True), both=False)
    assert sent(hosts, "a", "b")[0] == []
    assert hosts.packets(CUT) == MANY
    assert sent(hosts, "b", "a")[0] == everything, "one way"
    assert sent(hosts, "a", "c")[0] == everything, "no other link"
    hosts.link("a", "b", Rule(cut=True))
    assert sent(hosts, "b", "a")[0] == []
    hosts.all_links(Rule(loss=0.1))
    came = sent(hosts, "a", "b")[0]
    assert came == sorted(came)
    assert 0.8 * MANY < len(came) < 0.98 * MANY
    assert hosts.packets(LOST) == MANY - len(came)
    hosts.all_links(Rule(delay=0.5))
    came, seconds = sent(hosts, "a", "b")
    assert came == everything, "in order"
    assert seconds > 0.5
    assert hosts.packets(SEEN) == 7 * MANY


def test_leftovers_of_processes_that_are_gone_are_removed_and_no_others(hosts: Hosts) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = f"oarlock-{gone.pid}-1-shard-0"
    _ip("netns", "add", left)
    try:
        remove_leftovers()
        names = {line.split()[0] for line in _ip("netns", "list").splitlines()}
    finally:
        subprocess.run(["ip", "netns", "delete", left], stderr=subprocess.DEVNULL, check=False)
    assert left not in names
    mine = {name for name in names if (known := NAME.fullmatch(name)) and int(known[1]) == os.getpid()}
    assert len(mine) == 3
