"""Every fenced block of the documentation is run: the guide as it was given, and the pages that ship."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "tests" / "golden" / "streaming_guide.md"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "streaming.md",
    ROOT / "docs" / "online-serving.md",
    ROOT / "docs" / "profiling.md",
    ROOT / "docs" / "examples" / "chat-completion.md",
    ROOT / "docs" / "developer-guide" / "performance-tuning.md",
    ROOT / "examples" / "README.md",
)
SHELL = ("bash", "sh")
LINES = ("What is rain?", "And snow?")  # what a user types into an interactive chat, before leaving it
INTERACTIVE, PROGRESS_BAR = 5, 6  # the guide's blocks, counted from 0

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a Markdown file: its language, its text and the line of its first line."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def snippets(path: Path, *languages: str) -> list[Snippet]:
    """The fenced blocks of a Markdown file in these languages, or in any, in order."""
    text = path.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = [Snippet(path, text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in fences]
    return [snippet for snippet in found if not languages or snippet.language in languages]


def serves(snippet: Snippet) -> bool:
    """Whether the command runs until it is stopped."""
    return re.match(r"(\w+=\w+ )*inferneo serve ", snippet.text) is not None


ALL = [snippet for page in PAGES for snippet in snippets(page)]
SERVE_COMMANDS = [snippet for snippet in ALL if snippet.language in SHELL and serves(snippet)]
OTHER_COMMANDS = [snippet for snippet in ALL if snippet.language in SHELL and not serves(snippet)]


@dataclass(frozen=True)
class Ran:
    """What running one Python block left: both outputs, the traceback if it failed, and what it cost the server."""

    out: str
    err: str
    failure: str | None
    num_tokens: int
    statuses: Counter[str]


def run(snippet: Snippet, namespace: dict[str, Any], server: Any) -> Ran:
    """Execute a Python block in a namespace, with LINES on standard input."""
    code = compile("\n" * (snippet.line - 1) + snippet.text, str(snippet.path), "exec", dont_inherit=True)
    num_tokens, statuses, failure = server.generated_tokens(), server.statuses(), None
    stdin, sys.stdin = sys.stdin, io.StringIO("\n".join([*LINES, "quit", ""]))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            exec(code, namespace)
    except Exception:
        failure = traceback.format_exc()
    finally:
        sys.stdin = stdin
    statuses = server.statuses() - statuses
    return Ran(out.getvalue(), err.getvalue(), failure, server.generated_tokens() - num_tokens, statuses)


# The guide, as it was given


@pytest.fixture(scope="module")
def guide(server: Any) -> list[Ran]:
    """The guide's blocks, run in order in one namespace; with `time`, which two use before the last imports it."""
    namespace: dict[str, Any] = {"__name__": "__main__", "time": time}
    return [run(snippet, namespace, server) for snippet in snippets(GUIDE, "python")]


def test_guide_has_nine_blocks_and_each_is_python():
    assert [snippet.language for snippet in snippets(GUIDE)] == ["python"] * 9


@pytest.mark.parametrize("index", range(9))
def test_guide_block_runs_unchanged(index, guide):
    assert guide[index].failure is None, guide[index].failure
    assert guide[index].num_tokens > 0
    assert guide[index].statuses == {"200": len(LINES) if index == INTERACTIVE else 1}


@pytest.mark.parametrize("index", [2, 3, 8])
def test_guide_counts_every_token(index, guide):
    [counted] = re.findall(r"^Total tokens: (\d+)$", guide[index].out, re.MULTILINE)
    assert int(counted) == guide[index].num_tokens


def test_guide_interactive_chat_answers_each_line(guide):
    assert guide[INTERACTIVE].out.count("\nYou: Assistant: ") == len(LINES)
    assert guide[INTERACTIVE].out.endswith("\nYou: ")


def test_guide_progress_bar_ends_at_the_number_of_tokens(guide):
    shown = re.findall(r"Generated (\d+) tokens: +\d+%.*? (\d+)/200 ", guide[PROGRESS_BAR].err)
    assert shown
    described, counted = shown[-1]
    assert int(described) == int(counted) == guide[PROGRESS_BAR].num_tokens


# The pages that ship


def test_pages_hold_no_block_that_nobody_runs():
    assert {snippet.language for snippet in ALL} <= {"python", "json", *SHELL}
    folders = [ROOT / "docs", ROOT / "examples"]
    assert {page for folder in folders for page in folder.rglob("*.md")} == set(PAGES) - {ROOT / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", page.read_text(encoding="utf-8")):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor.lstrip("#") in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page, "python")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_page_python_runs_in_order(page, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a program writes stays out of the tree
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for snippet in snippets(page, "python"):
        ran = run(snippet, namespace, server)
        assert ran.failure is None, f"{snippet}\n{ran.failure}"
        shows_a_refusal = "except BadRequestError" in snippet.text
        # 499: the reader has left the stream
        assert set(ran.statuses) <= ({"400"} if shows_a_refusal else {"200", "499"}), f"{snippet}\n{ran.out}"


@pytest.mark.parametrize("snippet", OTHER_COMMANDS, ids=str)
def test_page_command_succeeds(snippet, server, shell):
    ran = shell(snippet.text, "\n".join([*LINES, "quit", ""]))
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert '"error"' not in ran.stdout
    assert ran.stdout


@pytest.mark.parametrize("command", sorted({snippet.text for snippet in SERVE_COMMANDS}))
def test_page_serve_command_serves(command, serve_briefly):
    with serve_briefly(command) as running:
        assert json.loads(running.get("/health")) == {"status": "ok"}


@pytest.mark.parametrize("snippet", [snippet for snippet in ALL if snippet.language == "json"], ids=str)
def test_page_json_is_json(snippet):
    json.loads(snippet.text)
