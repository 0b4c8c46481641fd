# SPDX-License-Identifier: Apache-2.0
"""Hosts as network namespaces of this machine, each with one device, whose other end is a switch (network_switch.py).

Invariant: names of namespaces say which process made them, and when that began; ``close`` removes them, and whoever makes hosts
removes those of processes that are gone. A device lasts as long as the process that has it open. Linux, with the right to make
both; ``lacking`` says what is missing.
"""

import contextlib
import fcntl
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from network_switch import Rule, Switch

TUN = "/dev/net/tun"
# ioctl TUNSETIFF: IP packets (IFF_TUN) with nothing before them (IFF_NO_PI).
TUNSETIFF, TUN_PACKETS = 0x400454CA, 0x1001
NAME = re.compile(r"oarlock-(\d+)-(\d+)-[\w-]+")
NETWORK, PREFIX = "10.211.1", 24
DEVICE = "uplink"
# As long as those of an Ethernet, so that losses are many small ones.
PACKET_BYTES = 1500


def _ip(*arguments: str, given: str = "") -> str:
    done = subprocess.run(["ip", *arguments], input=given, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _began(pid: int) -> int:
    """Return when a process began, in ticks since the machine did; 0 if there is none of that number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def _device() -> tuple[int, str]:
    """Return the file and the name of a new device, which ends when the file is closed."""
    file = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        made = fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", b"oarlock%d", TUN_PACKETS))
    except OSError:
        os.close(file)
        raise
    return file, made[:16].rstrip(b"\0").decode()


def remove_leftovers() -> None:
    """Remove the namespaces of processes that are gone."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        known = NAME.fullmatch(name)
        if known and _began(int(known[1])) != int(known[2]):
            # Another test process may be as quick.
            with contextlib.suppress(OSError):
                _ip("netns", "delete", name)


def lacking() -> str:
    """Return what is missing to make hosts here, empty: nothing."""
    if shutil.which("ip") is None:
        return "the program ip (iproute2) is not installed"
    try:
        with Hosts(["try"], seed=0):
            return ""
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


class Hosts:
    """Hosts ``names``, which all reach each other until a link is cut. A context manager."""

    def __init__(self, names: Sequence[str], *, seed: int) -> None:
        self.names = list(names)
        self._seed = seed
        self._devices: list[int] = []
        self._made: list[str] = []
        self._switch: Switch | None = None

    def __enter__(self) -> "Hosts":
        remove_leftovers()
        try:
            for number, name in enumerate(self.names):
                self._make(number, self._namespace(name))
            addresses = [bytes(map(int, self.address(name).split("."))) for name in self.names]
            self._switch = Switch(self._devices, addresses, self._seed)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _namespace(self, name: str) -> str:
        return f"oarlock-{os.getpid()}-{_began(os.getpid())}-{name}"

    def _make(self, number: int, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._made.append(namespace)
        file, device = _device()
        self._devices.append(file)
        _ip("link", "set", device, "netns", namespace, "name", DEVICE)
        lines = ("link set lo up", f"addr add {NETWORK}.{number + 1}/{PREFIX} dev {DEVICE}")
        up = f"link set {DEVICE} mtu {PACKET_BYTES} txqueuelen 1000 up"
        _ip("-n", namespace, "-batch", "-", given="\n".join((*lines, up, "")))

    def address(self, name: str) -> str:
        """Return a host's own address."""
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def command(self, name: str, command: Iterable[str]) -> list[str]:
        """Return what runs a command on a host, as one process."""
        return ["ip", "netns", "exec", self._namespace(name), *command]

    @property
    def switch(self) -> Switch:
        assert self._switch is not None, "made on entering"
        return self._switch

    def link(self, a: str, b: str, rule: Rule, *, both: bool = True) -> None:
        """Set the rule for what goes from host ``a`` to host ``b``, and with ``both`` also the other way."""
        pairs = {(self.names.index(a), self.names.index(b))}
        if both:
            pairs |= {(to, by) for by, to in pairs}
        self.switch.change(lambda pair, before: rule if pair in pairs else before)

    def all_links(self, rule: Rule) -> None:
        """Set the rule for all that goes from any host to any other."""
        self.switch.change(lambda pair, before: rule)

    def packets(self, kind: str) -> int:
        """Return how many packets were ``SEEN``, ``CUT`` or ``LOST``."""
        return sum(n for (what, _, _), n in self.switch.counts.items() if what == kind)

    def close(self) -> None:
        """Remove all. Processes that still run on a host keep it, without a device."""
        if self._switch is not None:
            self._switch.close()
            self._switch = None
        for file in self._devices:
            os.close(file)
        self._devices.clear()
        while self._made:
            with contextlib.suppress(OSError):
                _ip("netns", "delete", self._made.pop())
