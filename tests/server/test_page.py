"""The chat page in a real browser against a real server: what a user types, sees, stops and finds again.

The pictures go to the folder that INFERNEO_ARTIFACTS names, build/artifacts by default.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from inferneo.server.page import load_page
from inferneo_core import AsyncEngine

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = Path(os.environ.get("INFERNEO_ARTIFACTS", ROOT / "build" / "artifacts"))
MODEL = "smollm2-135m-instruct"
QUESTION = "Why is the sky blue?"
MARKUP = "Look: <img src=x onerror=alert(1)> and `<b>`:\n\n```html\n<script>alert(2)</script>\n```\n**Done.**"
FIGURES = re.compile(r"(\d+) tokens · [\d.]+ tokens/s · first token \d+ ms")
DONE = "!document.querySelector('.live') && document.querySelector('.assistant .note')?.textContent"
LIVE = "document.querySelector('.live .note')?.textContent"
TEXTS = "[...document.querySelectorAll('article .body')].map((body) => body.textContent)"
KEPT = "JSON.parse(localStorage.getItem('inferneo.chat'))"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(beside: Callable[[str], ModuleType]) -> Iterator[Any]:
    """A Chromium. Without one the tests are skipped, unless INFERNEO_REQUIRE_BROWSER is set."""
    helper = beside("browser")
    executable = helper.find_chromium()
    if executable is None:
        reason = "no Chromium was found (Debian, Ubuntu: apt install chromium)"
        pytest.fail(reason) if os.environ.get("INFERNEO_REQUIRE_BROWSER") else pytest.skip(reason)
    with helper.chromium(executable) as running:
        yield running


@pytest.fixture(scope="module")
def live(beside: Callable[[str], ModuleType], default_model: Path) -> Iterator[Any]:
    """A server of the default model."""
    engine = AsyncEngine(default_model, max_model_len=2048, kv_cache_memory=2**28, num_threads=1)
    with beside("live").serving(engine, served_model_names=(MODEL,)) as server:
        yield server


@pytest.fixture
def page(browser: Any, live: Any) -> Iterator[Any]:
    """The page, just opened. Afterwards: it has asked nobody but its server, and nothing in it has failed."""
    with browser.page() as opened:
        opened.resize(1100, 760)
        open_chat(opened, live)
        yield opened
        assert opened.failures == []
        elsewhere = [url for url in opened.requests if not url.startswith((live.url, live.ws_url, "data:"))]
        assert elsewhere == []


class Gate:
    """Holds an engine after so many steps, as a slow machine would, until it is opened."""

    def __init__(self, step: Callable[[], bool], steps: int) -> None:
        self._step, self._left = step, steps
        self._opened = threading.Event()

    def __call__(self) -> bool:
        if self._left == 0:
            assert self._opened.wait(120)
            return self._step()
        did_something = self._step()  # the last look for work, which finds none, is no step
        self._left -= did_something
        return did_something

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def hold(live: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Gate]]:
    """hold(steps) makes the server's engine stand still after so many steps from now, one token each."""
    gates: list[Gate] = []

    def make(steps: int) -> Gate:
        monkeypatch.setattr(live.engine._engine._runner, "num_steps", lambda batch: 1)
        gates.append(Gate(live.engine._engine.step, steps))
        monkeypatch.setattr(live.engine._engine, "step", gates[-1])
        return gates[-1]

    yield make
    for gate in gates:
        gate.open()


def open_chat(page: Any, live: Any) -> None:
    page.open(live.url + "/")
    page.wait_for("document.querySelector('#model').value")


def keep(page: Any, *messages: dict[str, Any], **settings: Any) -> None:
    """Come back to a chat with these messages and settings."""
    chat = json.dumps({"messages": messages, "temperature": 0, **settings})
    page.evaluate(f"localStorage.setItem('inferneo.chat', {json.dumps(chat)})")
    page.reload()
    page.wait_for("document.querySelector('#model').value")


def ask(page: Any, text: str) -> None:
    page.type(text)
    page.press("Enter")


# Talking


def test_answer_is_the_servers_own_with_as_many_tokens(page, live):
    page.click("#open-settings")
    page.wait_for("document.activeElement.id === 'system'")
    page.press("Tab")
    page.wait_for("document.activeElement.id === 'temperature'")
    page.press("Home")
    page.wait_for("document.querySelector('#temperature').value === '0'")
    page.press("Tab")
    page.wait_for("document.activeElement.id === 'max-tokens'")
    page.type("40")
    page.wait_for("document.querySelector('#max-tokens').value === '40'")
    page.press("Enter")
    page.wait_for(f"{KEPT}?.temperature === 0 && {KEPT}.maxTokens === 40")
    page.click("#prompt")
    ask(page, QUESTION)
    note = page.wait_for(DONE)

    request = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40}
    with live.client() as client:
        answer = client.post("/v1/chat/completions", json=request).json()
    [shown_question, shown_answer] = page.evaluate(TEXTS)
    assert shown_question == QUESTION
    assert shown_answer == answer["choices"][0]["message"]["content"].strip()
    counted = FIGURES.match(note)
    assert counted
    assert int(counted[1]) == answer["usage"]["completion_tokens"]
    page.screenshot(ARTIFACTS / "page.png")


def test_next_question_goes_with_the_whole_chat(page, live):
    keep(page, maxTokens=12, system="Be brief.")
    ask(page, QUESTION)
    page.wait_for(DONE)
    first = page.evaluate(KEPT)["messages"]
    ask(page, "And at night?")
    page.wait_for("document.querySelectorAll('.assistant').length === 2 && " + DONE)

    system = {"role": "system", "content": "Be brief."}
    sent = [{"role": message["role"], "content": message["content"]} for message in first]
    messages = [system, *sent, {"role": "user", "content": "And at night?"}]
    request = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12}
    with live.client() as client:
        answer = client.post("/v1/chat/completions", json=request).json()
    assert page.evaluate(KEPT)["messages"][3]["content"] == answer["choices"][0]["message"]["content"]


def test_figures_and_text_are_shown_while_the_answer_comes(page, hold):
    keep(page)
    gate = hold(10)
    ask(page, QUESTION)
    page.wait_for(f"{LIVE}?.startsWith('10 tokens')")
    assert FIGURES.fullmatch(page.evaluate(LIVE))
    assert page.evaluate(TEXTS)[1]
    assert page.evaluate("document.querySelector('#log').ariaBusy") == "true"
    page.screenshot(ARTIFACTS / "page_live.png")
    page.press("Escape")
    gate.open()


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_ends_the_request_on_the_server(way, page, live, hold):
    aborts = live.engine.stats().aborts
    keep(page)
    gate = hold(8)
    ask(page, "Count from one to a thousand.")
    page.wait_for(f"{LIVE}?.startsWith('8 tokens')")
    page.press("Escape") if way == "Escape" else page.click("#send")
    assert page.wait_for(DONE).endswith("stopped")
    live.wait_until(lambda: live.service.lifecycle.num_requests == 0)
    gate.open()
    live.wait_until(lambda: live.engine.stats().aborts == aborts + 1)
    live.wait_until_idle()


def test_stop_before_the_first_token_gives_the_question_back(page, hold):
    gate = hold(0)
    ask(page, QUESTION)
    page.wait_for(f"{LIVE}?.startsWith('waiting')")
    page.press("Escape")
    gate.open()
    assert page.evaluate("document.querySelector('#prompt').value") == QUESTION
    assert page.evaluate(TEXTS) == []


def test_error_is_shown_and_gives_the_question_back(page):
    ask(page, "word " * 3000)
    notice = page.wait_for("document.querySelector('#notice').textContent")
    assert "2048" in notice
    assert page.evaluate("document.querySelector('#prompt').value") == "word " * 3000
    assert page.evaluate(KEPT)["messages"] == []


def test_try_again_replaces_the_answer(page):
    keep(page, {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Because."}, maxTokens=8)
    page.click(".again")
    page.wait_for(DONE)
    [question, answer] = page.evaluate(TEXTS)
    assert question == QUESTION
    assert answer != "Because."


# Keyboard


def test_shift_enter_starts_a_line(page):
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert page.evaluate("document.querySelector('#prompt').value") == "one\ntwo"
    assert page.evaluate(TEXTS) == []


def test_focus_is_visible_wherever_tab_leads(page):
    focus = "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
    accent = "getComputedStyle(document.querySelector('#composer')).borderColor"
    at_rest = page.evaluate(f"document.activeElement.blur(), {accent}")
    rings = {}
    for _ in range(8):  # past the end of the page and round again
        page.press("Tab")
        name, outline = page.evaluate(focus)
        rings[name] = page.evaluate(accent) != at_rest if name == "prompt" else outline == "solid"
    rings.pop("", None)  # the document itself, between the last and the first
    assert rings == dict.fromkeys(("model", "open-settings", "new-chat", "scroller", "prompt"), True)


def test_settings_are_left_by_escape_and_stop_nothing(page, hold):
    keep(page)
    gate = hold(4)
    ask(page, QUESTION)
    page.wait_for(f"{LIVE}?.startsWith('4 tokens')")
    page.click("#open-settings")
    page.press("Escape")
    page.wait_for("!document.querySelector('dialog[open]')")
    assert page.evaluate(LIVE).startswith("4 tokens")
    page.press("Escape")
    assert page.wait_for(DONE).endswith("stopped")
    gate.open()


# History


def test_history_survives_a_reload(page):
    keep(page, maxTokens=8)
    ask(page, QUESTION)
    page.wait_for(DONE)
    before = page.evaluate(TEXTS)
    page.reload()
    assert page.evaluate(TEXTS) == before
    assert len(before) == 2


def test_reload_in_mid_stream_keeps_what_has_come(page, live, hold):
    keep(page)
    gate = hold(6)
    ask(page, QUESTION)
    page.wait_for(f"{LIVE}?.startsWith('6 tokens')")
    before = page.evaluate(TEXTS)
    page.reload()
    assert page.evaluate(TEXTS) == before
    assert page.evaluate(DONE).endswith("stopped")
    gate.open()
    live.wait_until_idle()


def test_new_chat_begins_afresh_and_can_be_taken_back(page):
    keep(page, {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Because."})
    page.click("#new-chat")
    assert page.evaluate(TEXTS) == []
    page.click("#restore")
    assert page.evaluate(TEXTS) == [QUESTION, "Because."]
    page.click("#new-chat")
    page.reload()
    assert page.evaluate(TEXTS) == []


# Looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_scrolls_no_sideways(scheme, page):
    page.resize(360, 740, scale=2, phone=True)
    page.prefer_color_scheme(scheme)
    keep(page, {"role": "user", "content": "long" * 60}, {"role": "assistant", "content": MARKUP + "\n" + "x" * 400})
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    outside = "[...document.querySelectorAll('button, select, textarea')].filter((one) => one.getClientRects().length)"
    assert page.evaluate(f"{outside}.every((one) => one.getBoundingClientRect().right <= 360)")
    page.screenshot(ARTIFACTS / f"page_phone_{scheme}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_readable(scheme, page):
    """Contrast of at least 4.5, WCAG 2.2, success criterion 1.4.3."""
    page.prefer_color_scheme(scheme)
    pairs = ("text back", "muted back", "text raised", "muted raised", "text bubble", "text code", "error back")
    colours = page.evaluate(
        "Object.fromEntries('back raised text muted bubble code accent on-accent error'.split(' ').map((name) =>"
        " [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))"
    )
    assert (luminance(colours["back"]) < 0.5) == (scheme == "dark")
    for front, back in (pair.split() for pair in (*pairs, "on-accent accent")):
        lighter, darker = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (front, back)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    total = 0.0
    for weight, first in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
        share = int(colour[first : first + 2], 16) / 255
        total += weight * (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    return total


# Safety


def test_markup_of_a_model_stays_text(page):
    keep(page, {"role": "user", "content": "<i>Hi</i>"}, {"role": "assistant", "content": MARKUP})
    assert page.evaluate("document.querySelectorAll('article :is(img, script, i, b)').length") == 0
    assert page.evaluate("document.querySelector('article pre').textContent") == "<script>alert(2)</script>"
    assert page.evaluate("document.querySelector('article strong').textContent") == "Done."
    assert page.evaluate("document.querySelector('.user').textContent") == "<i>Hi</i>"


def test_policy_admits_the_page_alone(page, live):
    with live.client() as client:
        response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert response.text == load_page().html.decode()
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    injected = "(() => { try { document.body.innerHTML = '<b>hi</b>' } catch (error) { return error.name } })()"
    assert page.evaluate(injected) == "TypeError"
    page.failures.clear()  # the browser reports what it refused


def test_page_asks_for_the_key_until_it_is_right(browser, live_server):
    live = live_server(api_key="right")
    with browser.page() as page:
        page.open(live.url + "/")
        for key in ("wrong", "right"):
            page.wait_for("document.querySelector('#ask-key').open")
            ask(page, key)
        page.wait_for("document.querySelector('#model').value")
        page.evaluate("document.querySelector('#prompt').focus()")
        ask(page, "Hello")
        assert page.wait_for(DONE)
        assert page.evaluate("sessionStorage.getItem('inferneo.key')") == "right"
        assert "right" not in page.evaluate("JSON.stringify(localStorage)")
        assert not any("right" in url for url in page.requests)
