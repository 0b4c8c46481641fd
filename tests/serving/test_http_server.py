# SPDX-License-Identifier: Apache-2.0
"""The HTTP side towards those who are slow, many, wrong or unknown."""

import re
import socket
import ssl
import threading
import time
from http import HTTPStatus
from typing import Any

import pytest
from http_rig import SECONDS, Http, keys_body
from security_rig import Authority, opened, texts_of, tls_fields, write_tokens
from serving_rig import loaded

from oarlock.proto.errors import InvalidArgument
from oarlock.serving import http_server
from oarlock.serving.http_request import HEAD_BYTES, Response, json_response
from oarlock.serving.http_server import MAX_BODY_BYTES, HttpServer
from oarlock.serving.openapi import path_of
from oarlock.serving.rest import ROUTES

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def serve(model: Any) -> Any:
    made: list[Http] = []

    def start(**options: Any) -> Http:
        made.append(Http(loaded(model.store), **options))
        return made[-1]

    yield start
    for each in made:
        each.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("oarlock-http")]


def statuses(data: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+) ", data)]


def test_a_connection_is_kept_and_requests_may_come_at_once(serve: Any) -> None:
    http = serve()
    assert statuses(http.raw(LIVE * 3 + CLOSE)) == [200] * 4
    body = b'{"inputs": []}'
    post = b"POST /v2/models/user/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert statuses(http.raw(post + body + LIVE + CLOSE)) == [400, 200, 200]
    # Byte by byte.
    with socket.create_connection(http.place, timeout=SECONDS) as peer:
        for i in range(len(CLOSE)):
            peer.sendall(CLOSE[i : i + 1])
        assert peer.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_a_body_is_asked_for_by_who_waits_to_be_asked(serve: Any) -> None:
    http = serve()
    body = b'{"inputs": []}'
    head = b"POST /v2/models/user/infer HTTP/1.1\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body)
    with socket.create_connection(http.place, timeout=SECONDS) as peer:
        peer.sendall(head)
        assert peer.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.sendall(body)
        assert peer.recv(100).startswith(b"HTTP/1.1 400 ")


GOOD = b"GET /v2/health/live HTTP/1.1\r\n"
REFUSED = [
    (b"\r\n\r\n", 400),
    (b"GET /v2\r\n\r\n", 400),
    (b"GET v2 HTTP/1.1\r\n\r\n", 400),
    (b"GET http://x/v2 HTTP/1.1\r\n\r\n", 400),
    (b"GET /v2 HTTP/2.0\r\n\r\n", 400),
    (b"GET /v2\x00 HTTP/1.1\r\n\r\n", 400),
    (b"GET /v2 x HTTP/1.1\r\n\r\n", 400),
    (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 400),
    (b"\xff\xfe\x00" * 10 + b"\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 400),
    (GOOD + b"no colon\r\n\r\n", 400),
    (GOOD + b"a b: c\r\n\r\n", 400),
    (GOOD + b"a : c\r\n\r\n", 400),
    (GOOD + b": c\r\n\r\n", 400),
    (GOOD + b"a: b\r\n folded\r\n\r\n", 400),
    (GOOD + b"a: b\nc: d\r\n\r\n", 400),
    (GOOD + b"a: \x00\r\n\r\n", 400),
    (GOOD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
    (GOOD + b"Content-Length: -1\r\n\r\n", 400),
    (GOOD + b"Content-Length: +1\r\n\r\n", 400),
    (GOOD + b"Content-Length: 1e3\r\n\r\n", 400),
    (GOOD + b"Content-Length: 9999999999999999999999\r\n\r\n", 400),
    (GOOD + b"Authorization: a\r\nauthorization: b\r\n\r\n", 400),
    (GOOD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    (GOOD + b"Content-Encoding: gzip\r\n\r\n", 415),
    (GOOD + b"Expect: something\r\n\r\n", 417),
    (GOOD + b"Content-Length: 5\r\n\r\nhello", 400),
    (GOOD + b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1), 413),
    (GOOD + b"a: b\r\n" * 65 + b"\r\n", 431),
    (GOOD + b"a: " + b"b" * HEAD_BYTES + b"\r\n\r\n", 431),
    (b"G" * (HEAD_BYTES + 1), 431),
]


@pytest.mark.parametrize(("data", "status"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_request_is_refused_and_ends_the_connection(serve: Any, data: bytes, status: int) -> None:
    http = serve()
    assert statuses(http.raw(data)) == [status]
    assert http.json("GET", "/v2/health/live")[0] == 200


def test_who_sends_half_a_request_holds_a_connection_for_a_while_only(serve: Any) -> None:
    http = serve(seconds=0.2, idle_seconds=0.3)
    begun = time.monotonic()
    head = b"POST /v2/models/user/infer HTTP/1.1\r\nContent-Length: 100\r\n\r\n"
    for half in (b"", b"GET /v2", head, head + b"{"):
        assert http.raw(half, shut=False) == b""
    assert time.monotonic() - begun < SECONDS / 2


def test_a_newcomer_is_let_in_where_all_are_silent(serve: Any) -> None:
    http = serve(connections=4)
    silent = []
    # No more than may be ending at once: the next one would be sent away where their threads are slow to end.
    for half in (b"", b"GET", b"POST /v2/models/user/infer HTTP/1.1\r\nContent-Length: 100\r\n\r\n", b"") * 2:
        peer = socket.create_connection(http.place, timeout=SECONDS)
        peer.sendall(half)
        silent.append(peer)
    assert http.json("GET", "/v2/health/live")[0] == 200
    assert http.server.connections <= 4 + 8
    for peer in silent:
        peer.close()


def test_who_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Response(HTTPStatus.OK, (bytes(32 << 20),))
    monkeypatch.setattr(http_server, "BYTES_PER_SECOND", 1 << 30)
    server = HttpServer(lambda request: large, listen="127.0.0.1:0", seconds=0.2)
    host, _, port = server.start().rpartition(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as peer:
        peer.sendall(LIVE)
        deadline = time.monotonic() + 60
        while not server.answered or server.connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    server.stop()


def test_what_is_under_way_is_answered_at_the_end() -> None:
    entered, let = threading.Event(), threading.Event()

    def answer(request: Any) -> Response:
        entered.set()
        assert let.wait(SECONDS)
        return json_response(HTTPStatus.OK, {})

    server = HttpServer(answer, listen="127.0.0.1:0")
    host, _, port = server.start().rpartition(":")
    idle = socket.create_connection((host, int(port)), timeout=SECONDS)
    with socket.create_connection((host, int(port)), timeout=SECONDS) as peer:
        peer.sendall(LIVE)
        assert entered.wait(SECONDS)
        stopping = threading.Thread(target=server.stop, args=(SECONDS,))
        stopping.start()
        assert idle.recv(1) == b""
        let.set()
        found = peer.recv(1000)
        assert found.startswith(b"HTTP/1.1 200 OK")
        assert b"Connection: close" in found
        stopping.join(SECONDS)
        assert not stopping.is_alive()
    idle.close()
    server.stop()


def test_a_defect_is_no_end_of_the_process(serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    http = serve()

    def fails(*arguments: Any) -> None:
        raise RuntimeError("a secret place")

    with monkeypatch.context() as patch:
        patch.setattr(http.models, "infer", fails)
        status, answer = http.json("POST", "/v2/models/user/infer", keys_body([1]))
    assert status == 500
    assert "secret" not in answer["error"]
    assert "a secret place" in caplog.text
    assert http.json("POST", "/v2/models/user/infer", keys_body([1]))[0] == 200


# Who may


def test_every_route_but_health_asks_for_a_token(serve: Any, tmp_path: Any) -> None:
    path = write_tokens(tmp_path / "tokens")
    http = serve(security=opened(token_file=path, read_requests_per_second=0.0))
    texts = texts_of(path)
    wrong = [
        (),
        (("Authorization", "Bearer " + "x" * 43),),
        (("Authorization", "Bearer "),),
        (("Authorization", texts["admin"]),),
        (("Authorization", f"Basic {texts['admin']}"),),
        (("Token", texts["admin"]),),
    ]
    paths = [(route, path_of(route).format(name="user", version="0.1")) for route in ROUTES]
    for route, place in paths:
        for headers in wrong:
            status, told, data = http.ask(route.method, place, b"{}" if route.method == "POST" else None, headers)
            if route.open:
                assert status == 200, place
            else:
                assert (status, told["WWW-Authenticate"]) == (401, "Bearer"), place
                assert b"role" not in data
        for role, token in texts.items():
            body = keys_body([1]) if route.method == "POST" else None
            assert http.ask(route.method, place, body, [("Authorization", f"Bearer {token}")])[0] == 200, (place, role)
    for place in ("/", "/nothing", "/v2/models", "/v2/health", "/v2/health/live/x", "//v2/health/live", "/v2/../v2"):
        assert http.ask("GET", place)[0] == 401, place
    assert {route.answer for route in ROUTES if route.open} == {"live", "ready"}
    assert http.rest.denied["token"] > 20


def test_nothing_is_taken_of_who_is_not_known(serve: Any, tmp_path: Any) -> None:
    http = serve(security=opened(token_file=write_tokens(tmp_path / "tokens")))
    head = b"POST /v2/models/user/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % MAX_BODY_BYTES
    # The answer comes before the body.
    assert statuses(http.raw(head, shut=False)) == [401]
    assert http.server._bodies == 0
    two = b"GET /v2 HTTP/1.1\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n"
    assert statuses(http.raw(two)) == [400]


def test_callers_of_role_read_get_so_many_answers_a_second_and_inferences_all(serve: Any, tmp_path: Any) -> None:
    path = write_tokens(tmp_path / "tokens")
    http = serve(security=opened(token_file=path, read_requests_per_second=3.0))
    texts = texts_of(path)
    header = {role: [("Authorization", f"Bearer {text}")] for role, text in texts.items()}
    assert {http.ask("POST", "/v2/models/user/infer", keys_body([1]), header["read"])[0] for _ in range(12)} == {200}
    found = [http.ask("GET", "/v2", headers=header["read"])[0] for _ in range(8)]
    assert found[:3] == [200] * 3
    assert 429 in found
    assert {http.ask("GET", "/v2", headers=header["admin"])[0] for _ in range(8)} == {200}
    assert {http.ask("GET", "/v2/health/ready")[0] for _ in range(8)} == {200}


def test_tls(serve: Any, tmp_path: Any) -> None:
    authority = Authority(tmp_path)
    http = serve(security=opened(**tls_fields(tmp_path, authority)), seconds=0.5)
    context = ssl.create_default_context(cafile=str(authority.path))
    assert http.ask("POST", "/v2/models/user/infer", keys_body([1, 2]), context=context)[0] == 200
    # Who does not speak it, or says nothing, holds a connection for a while only.
    assert b"HTTP" not in http.raw(LIVE)
    assert http.raw(b"", shut=False) == b""
    assert http.ask("GET", "/v2/health/live", context=context)[0] == 200


def test_mutual_tls(serve: Any, tmp_path: Any) -> None:
    authority = Authority(tmp_path)
    http = serve(security=opened(**tls_fields(tmp_path, authority), mutual_tls=True))
    context = ssl.create_default_context(cafile=str(authority.path))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        http.ask("GET", "/v2", context=context)
    context.load_cert_chain(*authority.issue("caller"))
    assert http.ask("GET", "/v2", context=context)[0] == 200


@pytest.mark.parametrize("listen", ["nowhere", ":1", "127.0.0.1:x", "127.0.0.1:99999", "192.0.2.1:0"])
def test_where_nobody_can_listen_is_said(listen: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot listen on"):
        HttpServer(lambda request: json_response(HTTPStatus.OK, {}), listen=listen).start()
