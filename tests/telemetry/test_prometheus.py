# SPDX-License-Identifier: Apache-2.0
"""The page over HTTP, and peers who want no page: none of them costs a thread, or another's scrape."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import scrape

from oarlock.telemetry import prometheus
from oarlock.telemetry.exposition import exposition
from oarlock.telemetry.prometheus import HEAD_BYTES, LEFTOVER_BYTES, MAX_CONNECTIONS, MetricsServer
from oarlock.telemetry.registry import Registry

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    made: list[MetricsServer] = []

    def start(page: Callable[[], str] | None = None, **options: Any) -> str:
        registry = Registry()
        registry.add(lambda: {"oarlock_shard_pulls_total": 5}, shard="0")
        server = MetricsServer(page or (lambda: exposition(registry.collect())), **options)
        made.append(server)
        return server.start()

    yield start
    for server in made:
        server.stop()
        server.stop()


def is_well(address: str) -> None:
    assert scrape.metrics_at(address)["oarlock_shard_pulls_total"].at(shard="0") == 5
    assert sum(t.name == "oarlock-metrics" for t in threading.enumerate()) == 1


def say(address: str, words: bytes) -> bytes:
    with scrape.connect(address) as peer:
        peer.sendall(words)
        return bytes(scrape.heard(peer))


def test_the_page_is_at_its_path_alone_and_on_loopback(serve: Serve) -> None:
    address = serve()
    assert address.startswith("127.0.0.1:")
    is_well(address)
    assert scrape.get(address, "/metrics?name[]=x")[0] == "HTTP/1.0 200 OK"
    for path in ("/", "/metricsx", "/metrics/", "/../metrics", "/favicon.ico", "/%2e%2e/etc/passwd", "*"):
        status, headers, body = scrape.get(address, path)
        assert status.startswith("HTTP/1.0 404"), path
        assert "oarlock_shard" not in body
        assert headers["content-type"].startswith("text/plain")


def test_a_head_is_answered_without_the_page(serve: Serve) -> None:
    head, _, body = say(serve(), b"HEAD /metrics HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert body == b""


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"HTTP/1.0 501"),
        (b"BREW /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.0 501"),
        (b"__init__ /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.0 501"),
        (b"GET /metrics HTTP/9.9\r\n\r\n", b"505"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
        (b"GET /metrics HTTP/1.1 HTTP/1.1 x\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/one\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"\0" * 100 + b"\n\n", b"400"),
        (b"\r\n\r\n", b""),
        (b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"HTTP/1.0 431"),
        (b"GET /metrics HTTP/1.1\r\nx: " + b"y" * HEAD_BYTES + b"\r\n\r\n", b"HTTP/1.0 431"),
        (b"GET /" + b"y" * HEAD_BYTES, b"HTTP/1.0 431"),
        (b"GET /metrics HTTP/1.1\r\n: no name\r\n \xff\xfe\r\n\r\n", b"HTTP/1.0 200"),
    ],
)
def test_what_is_no_request_for_the_page_is_refused(serve: Serve, words: bytes, answer: bytes) -> None:
    address = serve(seconds=20.0)
    found = say(address, words)
    assert found[: len(answer)] == answer, found[:200]
    assert answer or not found
    is_well(address)


def test_half_a_request_goes_when_its_time_is_over(serve: Serve) -> None:
    address = serve(seconds=0.2)
    with scrape.connect(address) as half, scrape.connect(address) as silent:
        half.sendall(b"GET /metrics HTTP/1.1\r\nHost")
        is_well(address)
        # The end comes from the other side: nothing was sent that could have brought it about.
        assert scrape.heard(half) == b""
        assert scrape.heard(silent) == b""
    is_well(address)


def test_a_request_may_come_byte_by_byte(serve: Serve) -> None:
    with scrape.connect(serve()) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n":
            peer.send(bytes([byte]))
        assert scrape.heard(peer).startswith(b"HTTP/1.0 200 OK")


def test_a_crowd_that_says_nothing_keeps_nobody_out(serve: Serve) -> None:
    address = serve(seconds=600.0)
    crowd = [scrape.connect(address) for _ in range(4 * MAX_CONNECTIONS)]
    try:
        is_well(address)
        # The oldest had to go.
        assert scrape.heard(crowd[0]) == b""
        assert threading.active_count() < 4 * MAX_CONNECTIONS
    finally:
        for peer in crowd:
            peer.close()


def test_who_reads_nothing_keeps_nobody_waiting(serve: Serve) -> None:
    served: list[int] = []
    # Far more than the buffers of two sockets hold.
    large = "#" * (32 << 20)

    def page() -> str:
        served.append(1)
        return large if len(served) == 1 else "oarlock_up 1\n"

    address = serve(page, seconds=600.0)
    with scrape.connect(address) as deaf:
        deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert deaf.recv(1) == b"H"
        assert say(address, b"GET /metrics HTTP/1.0\r\n\r\n").endswith(b"oarlock_up 1\n")


def test_who_sends_without_end_is_cut_off(serve: Serve) -> None:
    address = serve(seconds=600.0)
    # What the kernels of both sides hold in between is not ours to bound.
    with scrape.connect(address) as peer, pytest.raises(OSError, match=r"reset|Broken pipe"):
        peer.sendall(bytes(LEFTOVER_BYTES + (64 << 20)))
    is_well(address)


def test_who_goes_at_once_is_no_harm(serve: Serve) -> None:
    address = serve()
    for words in (b"", b"GET", b"GET /metrics HTTP/1.1\r\n\r\n"):
        for _ in range(50):
            peer = scrape.connect(address)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.sendall(words)
            peer.close()
    is_well(address)


def test_a_page_that_fails_is_a_500_and_the_next_one_is_asked_for(serve: Serve) -> None:
    served: list[int] = []

    def page() -> str:
        served.append(1)
        if len(served) == 1:
            raise RuntimeError("no")
        return "oarlock_up 1\n"

    address = serve(page)
    assert scrape.get(address)[0] == "HTTP/1.0 500 Internal Server Error"
    assert scrape.get(address)[0] == "HTTP/1.0 200 OK"


def test_many_scrape_at_once(serve: Serve) -> None:
    address = serve()
    failures: list[BaseException] = []

    def scrape_some() -> None:
        try:
            for _ in range(20):
                scrape.metrics_at(address)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=scrape_some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_without_file_descriptors_it_is_deaf_for_a_while_and_not_dead(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "PAUSE_SECONDS", 0.01)
    address = serve()
    refused: list[int] = []
    accept = socket.socket.accept

    def no_more(self: socket.socket) -> tuple[socket.socket, object]:
        if len(refused) < 3:
            refused.append(1)
            raise OSError(24, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", no_more)
    is_well(address)
    assert len(refused) == 3


def test_an_address_that_is_taken_is_an_error(serve: Serve) -> None:
    port = int(serve().rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        MetricsServer(str, port=port).start()
    with pytest.raises(OSError, match=r".+"):
        MetricsServer(str, host="nobody.invalid").start()


def test_a_stopped_server_drops_who_waits(serve: Serve) -> None:
    server = MetricsServer(str, seconds=600.0)
    address = server.start()
    with scrape.connect(address) as waiting:
        waiting.sendall(b"GET /")
        server.stop()
        # Whether what it said was read before that decides how its connection ends.
        with contextlib.suppress(ConnectionResetError):
            assert scrape.heard(waiting) == b""
    with pytest.raises(OSError, match="refused"):
        scrape.connect(address)
