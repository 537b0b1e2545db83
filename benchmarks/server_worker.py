"""One process of bench_server.py: `python -m inferneo_benchmarks.server_worker ROLE CORES...`.

    engine CORE                 answers 64 prompts with AsyncEngine alone, for each line of its input
    server ENGINE_CORE CORE     serves the same AsyncEngine; its engine's thread on a core of its own
    client CORE PORT            asks the server for 64 streams at once, for each line of its input

A line of input is a salt that makes the prompts new; a line of output is the seconds from the first prompt to the last
token. The engine has one thread and no prefix cache, so that every round does the same work.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable

from inferneo_benchmarks.bench_model import prompt

from inferneo_core import AsyncEngine, SamplingParams

MODEL = "smollm2-135m-instruct"
NUM_STREAMS, PROMPT_TOKENS, NEW_TOKENS = 64, 128, 64
TOTAL_TOKENS = NUM_STREAMS * NEW_TOKENS


def engine() -> AsyncEngine:
    return AsyncEngine(MODEL, num_threads=1, max_num_seqs=NUM_STREAMS, max_model_len=512, enable_prefix_caching=False)


def prompts(salt: int) -> list[list[int]]:
    return [prompt(PROMPT_TOKENS, salt * NUM_STREAMS + number) for number in range(NUM_STREAMS)]


def work_alone(core: int) -> None:
    """The engine without a server, driven as the server drives it."""
    os.sched_setaffinity(0, {core})
    alone = engine()
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)

    def answer(salt: int) -> None:
        completions = asyncio.run(alone.generate(prompts(salt), params))
        assert all(len(completion.token_ids) == NEW_TOKENS for completion in completions)

    answer_lines(answer)


def serve(engine_core: int, core: int) -> None:
    """The server. Prints its port, then serves until a signal ends it."""
    from inferneo.server.serve import bind, serve as run
    from inferneo.server.settings import ServerSettings

    served = engine()
    engine_thread = served._thread.native_id
    assert engine_thread is not None
    os.sched_setaffinity(0, {core})  # of this thread, which will be the event loop's
    os.sched_setaffinity(engine_thread, {engine_core})
    settings = ServerSettings(served_model_names=(MODEL,), port=0)
    listener = bind(settings)
    run(served, settings, listener, announce=lambda line: print(listener.getsockname()[1], flush=True))


def ask(core: int, port: int) -> None:
    """A client that does no more than a socket needs: it counts the events, and looks into none."""
    os.sched_setaffinity(0, {core})

    def answer(salt: int) -> None:
        received = dict.fromkeys(map(open_stream, [port] * NUM_STREAMS, prompts(salt)), b"")
        with selectors.DefaultSelector() as selector:
            for connection in received:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, 65536)
                    received[key.fileobj] += data  # type: ignore[index]
                    if not data:
                        selector.unregister(key.fileobj)
        for connection, text in received.items():
            connection.close()
            assert text.count(b"data: {") == NEW_TOKENS and text.count(b"[DONE]") == 1, text[:1000]

    answer_lines(answer)


def open_stream(port: int, token_ids: list[int]) -> socket.socket:
    request = {"model": MODEL, "prompt": token_ids, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**request, "stream": True})
    headers = f"Host: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n{body}".encode())
    return connection


def answer_lines(answer: Callable[[int], None]) -> None:
    """Do a round for each line of the input, and say how long it took."""
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        answer(int(line))
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    role, *numbers = sys.argv[1:]
    {"engine": work_alone, "server": serve, "client": ask}[role](*map(int, numbers))
