# SPDX-License-Identifier: Apache-2.0
"""The page of metrics behind tokens and TLS: every route but /healthz asks for a token, and a slow peer stops nobody."""

import http.client
import socket
import ssl
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from security_rig import Authority, bearer, opened, texts_of, tls_fields, write_tokens

from oarlock.client.telemetry import observed
from oarlock.proto.errors import InvalidArgument
from oarlock.telemetry.prometheus import MetricsServer

ROUTES = ("/metrics", "/metrics?x=1", "/", "/healthz/../metrics", "/healthz2", "//metrics", "/debug", "*")


def get(address, path="/metrics", *, headers=(), method="GET", context=None):
    host, _, port = address.rpartition(":")
    kind = http.client.HTTPConnection if context is None else http.client.HTTPSConnection
    connection = kind(host, int(port), timeout=10, **({} if context is None else {"context": context}))
    try:
        connection.putrequest(method, path)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def served(security):
    return MetricsServer(lambda: "the page\n", allowed=security.may_read, context=security.http_context)


@pytest.fixture
def server(tmp_path):
    made = served(opened(token_file=write_tokens(tmp_path / "t")))
    yield made, made.start()
    made.stop()


def test_every_route_but_health_asks_for_a_token(server, tmp_path):
    _, address = server
    texts = texts_of(tmp_path / "t")
    good = texts["read"]
    wrong = (
        (),
        bearer("x" * 43),
        bearer(texts["train"]),
        bearer(good + "x"),
        (("Authorization", good),),
        (("Authorization", f"Basic {good}"),),
        (*bearer(good), *bearer(good)),
        (*bearer("x" * 43), *bearer(good)),
        (("Authorization", "Bearer é"),),
        (("Cookie", f"token={good}"),),
    )
    for headers in wrong:
        for path in ROUTES:
            for method in ("GET", "HEAD"):
                status, text, answered = get(address, path, headers=headers, method=method)
                assert status == 401, (path, headers)
                assert "the page" not in text
                assert answered["WWW-Authenticate"] == "Bearer"
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT"):
        assert get(address, method=method, headers=bearer(good))[0] == 501
    for role in ("read", "admin"):
        assert get(address, headers=bearer(texts[role]))[:2] == (200, "the page\n")
        assert get(address, "/nothing", headers=bearer(texts[role]))[0] == 404
    assert get(address, "/healthz")[:2] == (200, "ok\n")


def test_without_tokens_it_is_there_for_this_machine():
    server = MetricsServer(lambda: "the page\n")
    address = server.start()
    assert [get(address, path)[0] for path in ("/metrics", "/healthz", "/")] == [200, 200, 404]
    server.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_it_is_not_opened_to_others_without_tokens(host):
    with pytest.raises(InvalidArgument, match=r"cannot listen on .*--metrics-host"), observed("job", 0, host):
        pytest.fail("it was opened")


def client_context(authority, cert=None, key=None):
    context = ssl.create_default_context(cafile=str(authority.path))
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context


def test_over_tls_too(tmp_path):
    authority = Authority(tmp_path)
    security = opened(**tls_fields(tmp_path, authority), token_file=write_tokens(tmp_path / "t"))
    # More than TLS puts in one record, and than a socket's buffer takes.
    page = "x" * (4 << 20)
    server = MetricsServer(lambda: page, allowed=security.may_read, context=security.http_context)
    address = server.start()
    context = client_context(authority)
    good = bearer(texts_of(tmp_path / "t")["read"])
    assert get(address, context=context)[0] == 401
    assert get(address, "/healthz", context=context)[:2] == (200, "ok\n")
    assert get(address, headers=good, context=context)[:2] == (200, page)
    # In the clear nothing is answered.
    with pytest.raises((OSError, http.client.HTTPException)):
        get(address, headers=good)
    # Nor to who does not say a word of TLS; others are served meanwhile.
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as silent:
        silent.send(b"\x16\x03")
        assert get(address, headers=good, context=context)[0] == 200
    server.stop()


@pytest.mark.parametrize("said", [b"", b"\x16"])
def test_a_peer_that_is_gone_before_it_is_let_in_stops_nobody(tmp_path, said):
    authority = Authority(tmp_path)
    security = opened(**tls_fields(tmp_path, authority))
    asked, go_on = threading.Event(), threading.Event()

    def page():
        asked.set()
        go_on.wait(60)
        return "the page\n"

    server = MetricsServer(page, context=security.http_context)
    address = server.start()
    host, _, port = address.rpartition(":")
    context = client_context(authority)
    # The one thread of the page is busy, so they come and go before anybody looks at them.
    with ThreadPoolExecutor(1) as other:
        first = other.submit(get, address, context=context)
        assert asked.wait(60)
        for _ in range(3):
            gone = socket.create_connection((host, int(port)), timeout=10)
            gone.sendall(said)
            # Closed by a reset.
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()
        go_on.set()
        assert first.result()[:2] == (200, "the page\n")
    assert get(address, context=context)[:2] == (200, "the page\n")
    server.stop()


def test_a_certificate_of_the_caller_is_asked_for_where_nothing_else_tells_callers_apart(tmp_path):
    authority = Authority(tmp_path)
    fields = {**tls_fields(tmp_path, authority), "mutual_tls": True}
    client = authority.issue("client")
    for tokens, anonymous in (({}, False), ({"token_file": write_tokens(tmp_path / "t")}, True)):
        server = served(opened(**fields, **tokens))
        address = server.start()
        assert get(address, "/healthz", context=client_context(authority, *client))[0] == 200
        if anonymous:
            assert get(address, "/healthz", context=client_context(authority))[0] == 200
            assert get(address, context=client_context(authority))[0] == 401
        else:
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                get(address, "/healthz", context=client_context(authority))
        server.stop()


def test_a_newer_certificate_is_shown_to_newcomers(tmp_path):
    old, new = Authority(tmp_path), Authority(tmp_path, "newer")
    security = opened(look_seconds=0.0, **tls_fields(tmp_path, old))
    server = served(security)
    address = server.start()
    assert get(address, context=client_context(old))[0] == 200
    new.issue("server", into=(tmp_path / "server.pem", tmp_path / "server.key"))
    assert get(address, context=client_context(new))[0] == 200
    with pytest.raises(ssl.SSLError):
        get(address, context=client_context(old))
    (tmp_path / "server.pem").write_text("nothing")
    assert get(address, context=client_context(new))[0] == 200
    server.stop()
