"""The clients' own arguments: addresses, keys, headers, proxies, copies, and what their import loads."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import openai
import pytest

from inferneo import AsyncInferneoClient, InferneoClient
from inferneo.client.address import base_url_of, is_loopback

SECRET = "must-not-leave"


def send(client, ask):
    return client.chat.completions.create(**ask, stream=True)


def run_async(work):
    return asyncio.run(asyncio.wait_for(work, 60))


async def send_async(client, ask):
    async with client:
        return [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]


def dead_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# Addresses


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://example.org/models/v2", "https://example.org/models/v2"),
        ("http://[::1]:8000/v1/", "http://[::1]:8000/v1/"),
    ],
)
def test_base_url_gains_v1_where_there_is_no_path(given, expected):
    assert base_url_of(given) == expected
    assert str(InferneoClient(given).base_url).rstrip("/") == expected.rstrip("/")


@pytest.mark.parametrize(
    "given", ["localhost:8000", "ftp://localhost", "http://", "", None, "http://h/?a=1", "http://h/#a"]
)
def test_base_url_that_is_none_is_refused_by_name(given):
    with pytest.raises(ValueError, match="base_url is "):
        InferneoClient(given)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:1/v1", True),
        ("http://LOCALHOST", True),
        ("http://api.localhost", True),
        ("http://127.8.9.1:5", True),
        ("http://[::1]:8000", True),
        ("http://0.0.0.0:8000", True),
        ("http://example.org", False),
        ("http://localhost.example.org", False),
        ("http://10.0.0.1", False),
    ],
)
def test_loopback_is_recognised(url, expected):
    assert is_loopback(url) is expected


def test_client_needs_no_argument():
    assert str(InferneoClient().base_url) == "http://localhost:8000/v1/"
    assert str(AsyncInferneoClient().base_url) == "http://localhost:8000/v1/"


# Keys and headers


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [
        (None, None, "none"),
        (None, "from-env", "from-env"),
        ("given", "from-env", "given"),
        (lambda: "called", None, "called"),
    ],
)
def test_key_is_the_argument_or_ours_or_none(server, say, monkeypatch, argument, variable, expected):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    if variable is not None:
        monkeypatch.setenv("INFERNEO_API_KEY", variable)
    server.will(say.good, say.Answer([say.chunk(finish_reason="stop")]))
    with InferneoClient(server.url, api_key=argument) as client:
        assert len(list(send(client, say.ask))) == 4
        assert len(list(client.websocket_chat(**say.ask))) == 1
    assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {expected}"] * 2


def leak_everywhere(monkeypatch) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{dead_port()}/{SECRET}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"x-custom: {SECRET}\nauthorization: Bearer {SECRET}")


def test_openai_variables_are_never_sent(server, say, monkeypatch):
    leak_everywhere(monkeypatch)
    server.will(say.good, say.good, say.Answer([say.chunk(finish_reason="stop")]))
    client = InferneoClient(server.url, default_headers={"x-mine": "yes"})
    for sender in (client, client.with_options(max_retries=0)):
        assert len(list(send(sender, say.ask))) == 4
    assert len(list(client.copy(timeout=60).websocket_chat(**say.ask))) == 1
    assert len(server.requests) == 3
    for request in server.requests:
        assert SECRET not in repr(request)
        assert not {name for name in request.headers if name.startswith("openai-")}
        assert request.headers["x-mine"] == "yes"
    client.close()


def test_openai_variables_are_never_sent_by_the_async_client(server, say, monkeypatch):
    leak_everywhere(monkeypatch)
    server.will(say.good, say.good)
    for copied in (False, True):
        client = AsyncInferneoClient(server.url)
        assert len(run_async(send_async(client.copy() if copied else client, say.ask))) == 4
    assert SECRET not in repr(server.requests)


def test_explicit_organization_is_sent(server, say, monkeypatch):
    leak_everywhere(monkeypatch)
    server.will(say.good)
    with InferneoClient(server.url, organization="mine", project="ours").with_options(max_retries=0) as client:
        list(send(client, say.ask))
    headers = server.requests[0].headers
    assert (headers["openai-organization"], headers["openai-project"]) == ("mine", "ours")


# Proxies


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_loopback_is_never_reached_through_a_proxy(server, say, monkeypatch, scheme):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"{scheme}://127.0.0.1:{dead_port()}")
    server.will(say.good, say.Answer([say.chunk(finish_reason="stop")]), say.good)
    with InferneoClient(server.url, max_retries=0) as client:
        assert len(list(send(client, say.ask))) == 4
        assert len(list(client.websocket_chat(**say.ask))) == 1
    assert len(run_async(send_async(AsyncInferneoClient(server.url, max_retries=0), say.ask))) == 4


def test_proxy_is_used_for_other_servers_and_left_with_them(server, say, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)  # the scripted server stands in for the proxy
    server.will(say.good, say.good)
    far = InferneoClient("http://inferneo.invalid", max_retries=0)
    assert len(list(send(far, say.ask))) == 4
    assert server.requests[0].headers["host"] == "inferneo.invalid"
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{dead_port()}")
    near = far.with_options(base_url=server.url)
    assert len(list(send(near, say.ask))) == 4
    assert server.requests[1].headers["host"] == server.url.removeprefix("http://")
    with pytest.raises(openai.APIConnectionError):
        send(near.with_options(base_url="http://inferneo.invalid"), say.ask)


def test_http_client_of_the_caller_is_used_as_it_is(server):
    with openai.DefaultHttpxClient() as own, InferneoClient(server.url, http_client=own) as client:
        assert client._client is own


# Copies


def test_copy_is_of_the_same_kind_and_keeps_what_is_not_changed(server):
    with InferneoClient(server.url, api_key="k", timeout=7.0, default_headers={"x-mine": "1"}) as client:
        copy = client.with_options(max_retries=0, default_headers={"x-more": "2"})
        assert type(copy) is InferneoClient
        assert (copy.base_url, copy.api_key, copy.timeout, copy.max_retries) == (client.base_url, "k", 7.0, 0)
        assert copy._client is client._client
        assert copy._custom_headers == {"x-mine": "1", "x-more": "2"}
        assert type(AsyncInferneoClient(server.url).copy()) is AsyncInferneoClient


# Imports


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    return result.stdout


def test_importing_inferneo_loads_neither_the_sdk_nor_torch():
    code = "import inferneo, sys; print([name for name in ('openai', 'torch', 'websockets') if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_importing_the_client_loads_neither_torch_nor_the_engine():
    code = "from inferneo import InferneoClient; import sys; print({'torch', 'inferneo_core'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


@pytest.mark.parametrize(
    ("hidden", "use", "needs"),
    [
        ("openai", "from inferneo import InferneoClient", "the openai SDK"),
        (
            "websockets",
            "from inferneo import InferneoClient; InferneoClient().websocket_chat()",
            "the package websockets",
        ),
    ],
)
def test_missing_package_is_named_with_its_remedy(hidden, use, needs):
    code = f"""
import sys
sys.modules[{hidden!r}] = None
try:
    {use}
except ModuleNotFoundError as error:
    print(error)
"""
    printed = run_python(code)
    assert needs in printed
    assert "pip install 'inferneo[client]'" in printed


def test_sdk_of_another_generation_is_refused():
    code = """
import sys, types
sys.modules["openai"] = types.SimpleNamespace(__version__="1.109.1")
try:
    from inferneo import AsyncInferneoClient
except ImportError as error:
    print(error)
"""
    assert "openai is 1.109.1; InferneoClient needs 2.x or 3.x" in run_python(code)


def test_unknown_name_of_the_package_is_an_attribute_error():
    import inferneo

    with pytest.raises(AttributeError, match="no attribute 'Client'"):
        _ = inferneo.Client
