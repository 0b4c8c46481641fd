# SPDX-License-Identifier: Apache-2.0
"""A switch between hosts: it hands IP packets on, and cuts, delays or loses what goes from one host to another.

Each host is the other end of a tun device. Invariant: what goes from host a to host b obeys ``rules[a, b]`` as it was when the
packet came; which packet of a pair is lost is drawn from a seed and the packet's number. One thread of its own; ``rules`` is
replaced whole, from any thread.
"""

import contextlib
import heapq
import os
import random
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Packets of one host that are handed on before the next host has its turn.
TURN = 32
PACKET_BYTES = 65_536
ADDRESS_AT = slice(16, 20)
SEEN, CUT, LOST = "seen", "cut", "lost"


@dataclass(frozen=True)
class Rule:
    """What becomes of packets that go one way."""

    cut: bool = False
    delay: float = 0.0
    loss: float = 0.0


FREE = Rule()
Pair = tuple[int, int]


class Switch:
    """``devices``: files of tun devices that do not block, by host; ``addresses``: the hosts' own, 4 bytes each."""

    def __init__(self, devices: Sequence[int], addresses: Sequence[bytes], seed: int) -> None:
        self._devices = list(devices)
        self._hosts = {address: host for host, address in enumerate(addresses)}
        self._draws = {
            (a, b): random.Random(f"{seed} {a} {b}") for a in range(len(devices)) for b in range(len(devices)) if a != b
        }
        self._late: list[tuple[float, int, int, bytes]] = []
        self._number = 0
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="network-switch", daemon=True)
        self.rules: Mapping[Pair, Rule] = {}
        self.counts: Counter[tuple[str, int, int]] = Counter()
        self._thread.start()

    def _run(self) -> None:
        poll = select.epoll()
        by_file = {device: host for host, device in enumerate(self._devices)}
        for file in (*self._devices, self._wake[0]):
            poll.register(file, select.EPOLLIN)
        with contextlib.closing(poll):
            while True:
                wait = max(0.0, self._late[0][0] - time.monotonic()) if self._late else -1
                for file, _ in poll.poll(wait):
                    if file == self._wake[0]:
                        return
                    self._take(by_file[file])
                while self._late and self._late[0][0] <= time.monotonic():
                    _, _, to, packet = heapq.heappop(self._late)
                    self._give(to, packet)

    def _take(self, host: int) -> None:
        for _ in range(TURN):
            try:
                packet = os.read(self._devices[host], PACKET_BYTES)
            except BlockingIOError:
                return
            to = self._hosts.get(packet[ADDRESS_AT]) if packet[:1] == b"\x45" else None
            if to is None or to == host:
                # Whatever a host says to no other one of these.
                continue
            rule = self.rules.get((host, to), FREE)
            self.counts[SEEN, host, to] += 1
            if rule.cut:
                self.counts[CUT, host, to] += 1
            elif rule.loss and self._draws[host, to].random() < rule.loss:
                self.counts[LOST, host, to] += 1
            elif rule.delay:
                self._number += 1
                heapq.heappush(self._late, (time.monotonic() + rule.delay, self._number, to, packet))
            else:
                self._give(to, packet)

    def _give(self, to: int, packet: bytes) -> None:
        # A host whose queue is full, or that is being taken down, loses it.
        with contextlib.suppress(OSError):
            os.write(self._devices[to], packet)

    @property
    def waiting(self) -> bool:
        """Whether packets are on their way."""
        return bool(self._late)

    def change(self, made: Callable[[Pair, Rule], Rule]) -> None:
        """Replace the rule of every pair by what ``made`` says of it."""
        self.rules = {pair: made(pair, self.rules.get(pair, FREE)) for pair in self._draws}

    def close(self) -> None:
        """Hand nothing on any more."""
        os.write(self._wake[1], b"x")
        self._thread.join()
        for file in self._wake:
            os.close(file)
