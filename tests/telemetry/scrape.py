# SPDX-License-Identifier: Apache-2.0
"""A reader of the text exposition format 0.0.4 that shares nothing with what writes it, and complains of all it can.

It goes by the description of the format: a character at a time through labels, and over the whole page for what has to hold
together: one HELP and TYPE before the samples of a metric, its lines in one run, no sample twice, whole histograms.
"""

import math
import socket
from dataclasses import dataclass, field

LETTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
DIGITS = set("0123456789")
Labels = tuple[tuple[str, str], ...]


@dataclass
class Found:
    """One metric of a page; samples by (suffix, labels)."""

    kind: str = ""
    help: str | None = None
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def at(self, **labels: str) -> float:
        """Return the value of the sample with exactly these labels."""
        (value,) = (v for (suffix, found), v in self.samples.items() if not suffix and dict(found) == labels)
        return value

    def count(self, **labels: str) -> float:
        """Return how many values a histogram has seen."""
        (value,) = (v for (suffix, found), v in self.samples.items() if suffix == "_count" and dict(found) == labels)
        return value


def name_at(line: str, at: int, colons: bool) -> tuple[str, int]:
    begun = at
    allowed = LETTERS | DIGITS | ({":"} if colons else set())
    while at < len(line) and line[at] in allowed:
        at += 1
    assert at > begun, f"no name at {begun}: {line}"
    assert line[begun] not in DIGITS, line
    return line[begun:at], at


def labels_at(line: str, at: int) -> tuple[Labels, int]:
    found: list[tuple[str, str]] = []
    assert line[at] == "{"
    at += 1
    while line[at] != "}":
        name, at = name_at(line, at, colons=False)
        assert not name.startswith("__"), line
        assert line[at : at + 2] == '="', line
        at += 2
        text = ""
        while line[at] != '"':
            if line[at] == "\\":
                at += 1
                text += {"\\": "\\", '"': '"', "n": "\n"}[line[at]]
            else:
                text += line[at]
            at += 1
        at += 1
        found.append((name, text))
        if line[at] == ",":
            at += 1
            assert line[at] != "}", line
        else:
            assert line[at] == "}", line
    assert len({name for name, _ in found}) == len(found), line
    return tuple(found), at + 1


def value_of(text: str) -> float:
    assert text == text.strip()
    special = {"NaN": math.nan, "+Inf": math.inf, "-Inf": -math.inf}
    if text in special:
        return special[text]
    assert set(text) <= DIGITS | set("+-.eE"), text
    return float(text)


def parse(page: str) -> dict[str, Found]:
    """Return the metrics of a page, in its order."""
    assert page.endswith("\n")
    assert "\r" not in page
    metrics: dict[str, Found] = {}
    current = ""
    for line in page.removesuffix("\n").split("\n"):
        assert line, "an empty line says nothing"
        if line.startswith("# "):
            _, what, name, rest = line.split(" ", 3)
            assert what in ("HELP", "TYPE"), line
            if name != current:
                assert name not in metrics, f"{name} comes in two runs"
                current = name
                metrics[name] = Found()
            found = metrics[name]
            assert not found.samples, f"{line}: after the samples"
            if what == "HELP":
                assert found.help is None, line
                found.help = rest.replace("\\n", "\n").replace("\\\\", "\\")
            else:
                assert not found.kind, line
                assert rest in ("counter", "gauge", "histogram"), line
                found.kind = rest
            continue
        name, at = name_at(line, 0, colons=True)
        labels: Labels = ()
        if line[at] == "{":
            labels, at = labels_at(line, at)
        assert line[at] == " ", line
        assert name.startswith(current), f"{line}: not of {current}"
        suffix = name.removeprefix(current)
        found = metrics[current]
        assert suffix in (("_bucket", "_sum", "_count") if found.kind == "histogram" else ("",)), line
        assert (suffix, labels) not in found.samples, f"{line}: twice"
        found.samples[suffix, labels] = value_of(line[at + 1 :])
    for name, found in metrics.items():
        assert all((found.kind, found.help, found.samples)), name
        if found.kind == "histogram":
            whole(name, found)
        if found.kind == "counter":
            assert all(value >= 0 for value in found.samples.values()), name
    return metrics


def whole(name: str, found: Found) -> None:
    """Raise unless every histogram has ascending buckets up to infinity, and a sum and a count that go with them."""
    series: dict[Labels, list[tuple[float, float]]] = {}
    for (suffix, labels), value in found.samples.items():
        if suffix == "_bucket":
            bound = value_of(dict(labels)["le"])
            series.setdefault(tuple(pair for pair in labels if pair[0] != "le"), []).append((bound, value))
    for labels, buckets in series.items():
        assert buckets == sorted(buckets), name
        assert buckets[-1][0] == math.inf, name
        assert buckets[-1][1] == found.samples["_count", labels], name
        assert ("_sum", labels) in found.samples, name
    assert sum(suffix == "_count" for suffix, _ in found.samples) == len(series), name


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=30)


def heard(peer: socket.socket) -> bytes:
    """Return all that the other side says until it ends."""
    out = b""
    while data := peer.recv(65536):
        out += data
    return out


def get(address: str, path: str = "/metrics") -> tuple[str, dict[str, str], str]:
    """Return (status line, headers, body) of a GET."""
    with connect(address) as peer:
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: */*\r\n\r\n".encode())
        head, _, body = heard(peer).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert int(headers["content-length"]) == len(body)
    return status, headers, body.decode()


def metrics_at(address: str) -> dict[str, Found]:
    status, headers, body = get(address)
    assert status == "HTTP/1.0 200 OK"
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(body)
