"""From `inferneo serve` to the last word of the last stream: the socket, the command, and the end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from inferneo.cli import app
from inferneo.server.serve import Server, bind, describe_address, describe_end
from inferneo.server.settings import ServerSettings
from inferneo_core.errors import ConfigError

COMPLETIONS = "/v1/completions"
REQUEST: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 50, "ignore_eos": True, "stream": True}


def settings(**fields: Any) -> ServerSettings:
    return ServerSettings(**{"served_model_names": ("tiny",), **fields})


# The end


def open_stream(server: Any, beside: Any, halt: Any) -> tuple[Any, Any]:
    """A connection whose stream is under way in an engine that stands still."""
    halted = halt(server.engine._engine, 5)
    connection = server.connect()
    connection.sendall(beside("live").post(COMPLETIONS, json.dumps(REQUEST)))
    halted.reached()
    return connection, halted


def test_streams_may_finish_while_nothing_new_is_taken(live_server: Any, beside: Any, halt: Any) -> None:
    server = live_server(shutdown_seconds=60)
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}  # a connection that stays open
        connection, halted = open_stream(server, beside, halt)
        server.signal()
        server.wait_until(lambda: server.service.lifecycle.is_draining)
        assert client.get("/health").status_code == 503
        refused = client.post(COMPLETIONS, json=REQUEST)
        assert refused.status_code == 503
        assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("1", "true")
        assert refused.json()["error"]["code"] == "shutting_down"
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        halted.go()
        text = beside("live").read_all(connection)
        assert text.count(b"data: ") == 51
        assert b"data: [DONE]" in text and b"error" not in text
        server.join()
    assert server.waited_for == [1]


def test_streams_that_take_too_long_end_with_an_error_event(live_server: Any, beside: Any, halt: Any) -> None:
    server = live_server(shutdown_seconds=0.05)
    connection, halted = open_stream(server, beside, halt)
    server.signal()
    text = beside("live").read_all(connection)
    *_, error, done = text.decode().split("data: ")
    assert json.loads(error.partition("\n")[0])["error"]["code"] == "shutting_down"
    assert done.startswith("[DONE]")
    halted.go()
    server.join()
    assert server.engine.is_closed


def test_whole_answer_that_takes_too_long_is_a_503(live_server: Any, halt: Any, background: Any) -> None:
    server = live_server(shutdown_seconds=0.05)
    halted = halt(server.engine._engine, 5)
    with server.client() as client:
        post = background(lambda: client.post(COMPLETIONS, json={**REQUEST, "stream": False}))
        halted.reached()
        server.signal()
        response = post.result()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
    halted.go()
    server.join()


def test_half_a_request_does_not_hold_up_the_end(live_server: Any, beside: Any) -> None:
    server = live_server(shutdown_seconds=0.05)
    connection = server.connect()
    connection.sendall(beside("live").post(COMPLETIONS, json.dumps(REQUEST))[:-1])
    server.wait_until(lambda: server.service.lifecycle.num_requests == 1)
    server.signal()
    assert b"shutting_down" in beside("live").read_all(connection)
    server.join()


def test_second_signal_ends_it_at_once(live_server: Any, beside: Any, halt: Any) -> None:
    server = live_server(shutdown_seconds=3600)
    connection, halted = open_stream(server, beside, halt)
    server.signal()
    server.wait_until(lambda: server.service.lifecycle.is_draining)
    server.signal()
    assert b"shutting_down" in beside("live").read_all(connection)
    halted.go()
    server.join()


def test_websockets_are_told_of_the_end(live_server: Any, halt: Any) -> None:
    server = live_server(shutdown_seconds=0.05)
    halted = halt(server.engine._engine, 5)
    url = f"{server.ws_url}{COMPLETIONS}"
    with connect(url, proxy=None) as busy, connect(url, proxy=None) as idle:
        busy.send(json.dumps(REQUEST))
        halted.reached()
        server.signal()
        messages = [json.loads(busy.recv(60)) for _ in range(6)]  # a token of each step before, and the last word
        assert messages[-1]["error"]["code"] == "shutting_down"
        with pytest.raises(ConnectionClosedError) as closed:
            busy.recv(60)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        with pytest.raises(ConnectionClosedError) as closed:
            idle.recv(60)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
    halted.go()
    server.join()


# The socket


def test_taken_port_is_an_error_that_says_so() -> None:
    with bind(settings(port=0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1, port {port}.*--port"):
            bind(settings(port=port))


def test_port_that_another_server_took_meanwhile_is_an_error_that_says_so(async_engine: Any) -> None:
    with bind(settings(port=0)) as first:
        port = first.getsockname()[1]
        with bind(settings(port=port)) as second:  # neither listens yet
            first.listen()
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}"):
                Server(async_engine(), settings(port=port), pytest.fail, pytest.fail).run(sockets=[second])


@pytest.mark.parametrize("host", ["256.1.1.1", "no.such.host.invalid"])
def test_impossible_host_is_an_error_that_names_it(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}"):
        bind(settings(host=host))


def test_socket_does_not_listen_before_the_model_is_there() -> None:
    with bind(settings(port=0)) as listener, socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(listener.getsockname())


def test_loopback_is_announced_without_a_warning() -> None:
    (line,) = describe_address(settings(), 8000)
    assert line == "Serving tiny at http://127.0.0.1:8000/v1, the chat page at http://127.0.0.1:8000/ (Ctrl-C stops)"
    (line,) = describe_address(settings(host="::1", show_ui=False), 9)
    assert line == "Serving tiny at http://[::1]:9/v1 (Ctrl-C stops)"


def test_other_addresses_are_warned_of() -> None:
    _, warning = describe_address(settings(host="0.0.0.0"), 8000)
    assert "every machine that reaches 0.0.0.0" in warning
    assert "WITHOUT an API key" in warning
    _, warning = describe_address(settings(host="0.0.0.0", api_key="secret"), 8000)
    assert "WITHOUT" not in warning and "secret" not in warning


def test_end_is_announced_with_what_it_waits_for() -> None:
    line = describe_end(settings(shutdown_seconds=2.5), 1)
    assert line == "Waiting up to 2.5 s for 1 request to end (Ctrl-C again ends at once)"
    assert "10 s for 3 requests" in describe_end(settings(), 3)


# The command


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("inferneo.cli_serve.serve_model", lambda *args, **kwargs: seen.update(args=args))
    options = "--served-model-name a --served-model-name b --host ::1 --port 9 --api-key k --no-ui --max-queued 3"
    options += " --allowed-host h --allowed-origin o --shutdown-seconds 1.5 --threads 2 --max-num-seqs 5"
    result = CliRunner().invoke(app, ["serve", "m", *options.split()])
    assert result.exit_code == 0, result.output
    model, engine_arguments, chosen = seen["args"]
    made = ServerSettings(**chosen)
    assert model == "m"
    assert (made.served_model_names, made.host, made.port, made.api_key) == (("a", "b"), "::1", 9, "k")
    assert (made.show_ui, made.max_queued, made.shutdown_seconds) == (False, 3, 1.5)
    assert (made.allowed_hosts, made.allowed_origins) == (("h",), ("o",))
    assert engine_arguments == {
        "device": "auto",
        "dtype": "auto",
        "num_threads": 2,
        "max_model_len": None,
        "max_num_seqs": 5,
    }


def test_model_serves_under_its_own_name_and_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("inferneo.cli_serve.serve_model", lambda *args, **kwargs: seen.append(args[2]))
    assert CliRunner().invoke(app, ["serve", "m"], env={"INFERNEO_API_KEY": "from there"}).exit_code == 0
    assert seen[0]["served_model_names"] == ("m",)
    assert seen[0]["api_key"] == "from there"


def test_help_states_the_defaults_that_hold() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
    stated = re.findall(r"--([a-z-]+) .*Default: ([\d.]+)\.", text)
    assert len(stated) == 9
    for option, default in stated:
        assert getattr(settings(), option.replace("-", "_")) == float(default), option


@pytest.mark.parametrize(
    ("options", "words"), [(["--api-key", ""], "api_key is empty"), (["--max-queued", "0"], "max_queued is 0")]
)
def test_impossible_option_is_one_line(options: list[str], words: str, chat_model: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(chat_model), *options])
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, chat_model: Path) -> None:
    monkeypatch.setattr("inferneo.cli_serve.NEEDED", ("fastapi", "no_such_library"))
    result = CliRunner().invoke(app, ["serve", str(chat_model)])
    assert result.exit_code == 1
    assert "no_such_library cannot be imported (pip install 'inferneo[server]')" in result.stderr


def test_command_serves_until_it_is_told_to_stop(chat_model: Path) -> None:
    command = [sys.executable, "-c", "from inferneo.cli import main; main()", "serve", str(chat_model), "--port", "0"]
    command += ["--served-model-name", "tiny", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        announcement = process.stderr.readline()
        (url,) = re.findall(r"Serving tiny at (http://127.0.0.1:\d+)/v1", announcement)
        with httpx.Client(trust_env=False, timeout=60) as client:
            assert client.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
            assert client.post(f"{url}{COMPLETIONS}", json=REQUEST).text.count("data: ") == 51
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        assert process.stderr.read() == ""
