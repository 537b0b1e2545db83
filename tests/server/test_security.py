"""Host, Origin and key: who is let in, over HTTP and on the WebSocket upgrade."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from inferneo.server.security import is_key, is_loopback, take_token

CHAT = "/v1/chat/completions"
GUARDED = [
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", CHAT),
    ("POST", "/v1/completions"),
    ("GET", "/no/such/route"),
]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("app.localhost", 200),
        ("rebound.example", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example:8000", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_host_must_mean_this_machine_when_bound_to_loopback(host: str, status: int, live_server: Any) -> None:
    with live_server().client() as client:
        response = client.get("/health", headers={"Host": host})
        assert response.status_code == status
        if status == 403:
            assert response.json()["error"]["code"] == "invalid_host"
            assert response.headers["x-should-retry"] == "false"


def test_two_hosts_are_refused(live_server: Any) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: rebound.example\r\nConnection: close\r\n\r\n"
    assert live_server().exchange(request).startswith("HTTP/1.1 403")


def test_allowed_host_is_let_in_beside_the_loopback(live_server: Any) -> None:
    with live_server(allowed_hosts=("model.lan",)).client() as client:
        assert client.get("/health", headers={"Host": "model.lan:80"}).status_code == 200
        assert client.get("/health", headers={"Host": "localhost"}).status_code == 200
        assert client.get("/health", headers={"Host": "other.lan"}).status_code == 403


def test_any_host_is_let_in_where_the_server_listens_for_all(live_server: Any) -> None:
    with live_server(host="0.0.0.0").client() as client:
        assert client.get("/health", headers={"Host": "model.lan"}).status_code == 200
    with live_server(host="0.0.0.0", allowed_hosts=("model.lan",)).client() as client:
        assert client.get("/health", headers={"Host": "other.lan"}).status_code == 403


def test_pages_of_other_origins_are_refused(live_server: Any) -> None:
    server = live_server()
    with server.client() as client:
        for origin in ("https://evil.example", "null", f"http://localhost:{server.port + 1}", "["):
            response = client.post(CHAT, headers={"Origin": origin}, json={})
            assert (response.status_code, response.json()["error"]["code"]) == (403, "invalid_origin")
            assert "access-control-allow-origin" not in response.headers
        assert client.get("/health", headers={"Origin": server.url}).status_code == 200


def test_allowed_origin_gets_cors_headers_and_others_do_not(live_server: Any) -> None:
    with live_server(allowed_origins=("https://chat.example",), api_key="k").client() as client:
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        response = client.options(CHAT, headers={"Origin": "https://chat.example", **preflight})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-credentials" not in response.headers
        assert client.options(CHAT, headers={"Origin": "https://evil.example", **preflight}).status_code == 400
        response = client.get("/v1/models", headers={"Origin": "https://chat.example", "Authorization": "Bearer k"})
        assert response.headers["access-control-allow-origin"] == "https://chat.example"
        assert client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize(("headers", "status"), [({"Origin": "https://evil.example"}, 403), ({"Host": "evil"}, 403)])
def test_websocket_upgrade_is_checked_too(headers: dict[str, str], status: int, live_server: Any) -> None:
    with pytest.raises(InvalidStatus) as refused:
        open_socket(live_server(), headers=headers)
    assert refused.value.response.status_code == status
    assert b"error" in refused.value.response.body


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_key_is_needed_wherever_work_is_done(method: str, path: str, live_server: Any) -> None:
    with live_server(api_key="sesame").client() as client:
        for authorization in ("Bearer wrong", "Bearer sesame1", "Bearer", "Basic sesame", "Bearer sésame"):
            response = client.request(method, path, headers={"Authorization": authorization.encode()}, json={})
            assert response.status_code == 401, authorization
            assert response.json()["error"]["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "sesame" not in response.text
        assert client.request(method, path, json={}).status_code == 401
        assert client.request(method, f"{path}?token=sesame", json={}).status_code == 401  # of WebSockets only
        right = client.request(method, path, headers={"Authorization": "bearer sesame"}, json={})
        assert right.status_code in (200, 400, 404)


def test_health_and_page_need_no_key(live_server: Any) -> None:
    with live_server(api_key="sesame").client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200


def test_key_may_be_any_text(live_server: Any) -> None:
    with live_server(api_key="clé 🔑").client() as client:
        assert client.get("/v1/models", headers={"Authorization": "Bearer clé 🔑".encode()}).status_code == 200


def test_websocket_takes_the_key_from_header_or_query(live_server: Any) -> None:
    server = live_server(api_key="s&same")
    for query, headers in (
        ("", {"Authorization": "Bearer s&same"}),
        ("?token=s%26same", {}),
        ("?a=1&%74oken=s%26same&b=2", {}),
    ):
        with open_socket(server, query, headers) as socket:
            socket.send('{"type": "ping"}')
            assert socket.recv(60) == '{"type":"pong"}'
            socket.send("[]")
            assert "error" in socket.recv(60)
    for path, headers in (("?token=wrong", {}), ("", {"Authorization": "Bearer wrong"}), ("?token=", {})):
        with pytest.raises(InvalidStatus) as refused:
            open_socket(server, path, headers=headers)
        assert refused.value.response.status_code == 401


def test_websocket_takes_the_key_from_the_first_message(live_server: Any) -> None:
    server = live_server(api_key="sesame")
    with open_socket(server) as socket:
        socket.send('{"type": "auth", "api_key": "sesame"}')
        assert socket.recv(60) == '{"type":"authenticated"}'
    for first in ('{"type": "auth", "api_key": "wrong"}', '{"type": "auth", "api_key": 5}', '{"type": "auth"}', "{}"):
        with open_socket(server) as socket:
            socket.send(first)
            assert "invalid_api_key" in socket.recv(60)
            with pytest.raises(ConnectionClosedError) as closed:
                socket.recv(60)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


def test_websocket_does_not_wait_for_a_key_for_ever(live_server: Any) -> None:
    with open_socket(live_server(api_key="sesame", receive_seconds=0.05)) as socket:
        assert "invalid_api_key" in socket.recv(60)
        with pytest.raises(ConnectionClosedError):
            socket.recv(60)


def test_no_key_is_logged(live_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = live_server(api_key="sesame-street")
    with server.client() as client:
        client.get("/v1/models?token=sesame-street", headers={"Authorization": "Bearer sesame-street"})
    with open_socket(server, "?token=sesame-street"):
        pass
    server.stop()
    assert any("/v1/models" in record.getMessage() for record in caplog.records)
    ours = [record for record in caplog.records if not record.name.startswith(("httpcore", "httpx", "websockets"))]
    assert not [record for record in ours if "sesame-street" in record.getMessage()]


@pytest.mark.parametrize(
    ("query", "token", "left"),
    [
        (b"", None, b""),
        (b"a=1&b=2", None, b"a=1&b=2"),
        (b"token=x", "x", b""),
        (b"a=1&token=x&b=%20", "x", b"a=1&b=+"),
        (b"%74oken=x", "x", b""),
        (b"token=first&token=last", "last", b""),
        (b"mytoken=x", None, b"mytoken=x"),
    ],
)
def test_token_is_taken_out_of_the_query(query: bytes, token: str | None, left: bytes) -> None:
    scope = {"query_string": query}
    assert take_token(scope) == token
    assert scope["query_string"] == left


@pytest.mark.parametrize(
    ("name", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_is_told_from_the_rest(name: str, expected: bool) -> None:
    assert is_loopback(name) is expected


def test_key_comparison_accepts_only_the_whole_key() -> None:
    assert is_key("sesame", b"sesame")
    assert not any(is_key(given, b"sesame") for given in (None, "", "sesam", "sesame ", "SESAME", "\udc80"))


def open_socket(server: Any, query: str = "", headers: dict[str, str] | None = None) -> Any:
    """A WebSocket to the server."""
    return connect(f"{server.ws_url}{CHAT}{query}", additional_headers=headers, proxy=None)
