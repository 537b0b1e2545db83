"""Fixtures of the server's tests: a tiny model that can chat, and real servers over it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from inferneo.server.generation import HEARTBEAT, Generation
from inferneo.server.protocol import ChatCompletionRequest, CompletionRequest, validate
from inferneo.server.settings import ServerSettings
from inferneo_core import AsyncEngine

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def load_beside(name: str) -> ModuleType:
    """A helper module of this folder, which is no package."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"server_tests_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "__loaded__"):
        spec.loader.exec_module(module)
        module.__loaded__ = True  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="session")
def beside() -> Callable[[str], ModuleType]:
    """beside(name) is a helper module of this folder."""
    return load_beside


@pytest.fixture(scope="session")
def chat_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model(), directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return directory


@pytest.fixture
def live_server(chat_model: Path) -> Iterator[Callable[..., Any]]:
    """live_server(engine={...}, **settings) starts a LiveServer over a tiny engine; the test's end stops it.

    A server that still runs then must be idle, with every block free.
    """
    live = load_beside("live")
    with ExitStack() as stack:

        def start(*, engine: dict[str, Any] | None = None, **settings: Any) -> Any:
            arguments = {"kv_cache_memory": 8 * 2**20, "num_threads": 1, **(engine or {})}
            return stack.enter_context(live.serving(AsyncEngine(chat_model, **arguments), **settings))

        yield start


@pytest.fixture
def settings() -> Callable[..., ServerSettings]:
    """settings(**fields) of a server for the model "tiny"."""
    return lambda **fields: ServerSettings(**{"served_model_names": ("tiny", "alias"), **fields})


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """run(coroutine) in a new event loop; hanging is failing."""

    async def limited(work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wait_for(work, 60)

    return lambda work: asyncio.run(limited(work))


@pytest.fixture
def async_engine(chat_model: Path) -> Iterator[Callable[..., AsyncEngine]]:
    """async_engine(**arguments) makes an AsyncEngine; whatever the test did with it, every block is back afterwards."""
    made: list[AsyncEngine] = []

    def make(**arguments: Any) -> AsyncEngine:
        made.append(AsyncEngine(chat_model, **{"kv_cache_memory": 8 * 2**20, "num_threads": 1, **arguments}))
        return made[-1]

    yield make
    for engine in made:
        asyncio.run(assert_idle(engine))
        asyncio.run(engine.close())


async def assert_idle(engine: AsyncEngine) -> None:
    """Fails unless every request ends and every block comes back."""
    for _ in range(30_000):
        stats = engine.stats()
        if stats.running == stats.waiting == 0:
            break
        await asyncio.sleep(0.002)
    assert stats.running == stats.waiting == 0
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


@pytest.fixture
def start(settings):
    """start(engine, transport, fields, **limits) validates and starts a request."""

    async def make(engine: Any, transport: Any, fields: dict[str, Any], **limits: Any) -> Generation:
        model = CompletionRequest if "prompt" in fields else ChatCompletionRequest
        given = {
            "model": "tiny",
            **({} if "prompt" in fields else {"messages": [{"role": "user", "content": "Tell me"}]}),
            **fields,
        }
        return await Generation.start(engine, validate(model, given), settings(**limits), transport=transport)

    return make


@pytest.fixture
def collect(start, run):
    """collect(engine, transport, fields) is the list of all chunks, or the whole answer over "http"."""

    def make(engine: Any, transport: str, fields: dict[str, Any], **limits: Any) -> Any:
        async def main() -> Any:
            generation = await start(engine, transport, fields, **limits)
            if transport == "http":
                return await generation.result()
            return [chunk async for chunk in generation.chunks() if chunk is not HEARTBEAT]

        return run(main())

    return make


@pytest.fixture
def texts() -> Callable[..., list[str]]:
    """texts(chunks, index=0): the text of each token of one choice."""

    def make(chunks: list[Any], index: int = 0) -> list[str]:
        entries = [entry for chunk in chunks for entry in chunk["choices"] if entry["index"] == index]
        parts = [entry["delta"].get("content") if "delta" in entry else entry["text"] for entry in entries]
        return [part for part in parts if part is not None]

    return make


@pytest.fixture
def hostile(live_server: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """hostile(**settings) starts a server, which must serve as ever when the test is over."""
    servers: list[Any] = []

    def start(**arguments: Any) -> Any:
        servers.append(live_server(**arguments))
        return servers[-1]

    yield start
    request = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
    for server in servers:
        with server.client() as client:
            assert client.post("/v1/completions", json=request).json()["usage"]["completion_tokens"] == 4
        server.wait_until_idle()
