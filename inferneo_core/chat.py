"""Chat messages to the text that a model was trained on, by the model's own jinja2 template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from inferneo_core.chat_meter import BudgetExceeded, Meter
from inferneo_core.chat_sandbox import METER, compile_template
from inferneo_core.errors import ChatTemplateError, InvalidPrompt

MAX_TEMPLATE_CHARS = 1 << 18  # the longest in use have some 20,000
MAX_MESSAGE_DEPTH = 32


class ChatTemplate:
    """One model's chat template, compiled once, rendered under a budget (see `chat_sandbox`).

    The dialect is Hugging Face's: trimmed blocks, `break` and `continue`, `raise_exception`, `strftime_now`, a
    `tojson` that leaves HTML alone, `{% generation %}`. A template sees `messages`, `add_generation_prompt`, `tools`
    and `documents` (both None), and the texts of the model's special tokens.

    Immutable, so any number of threads may render at once.
    """

    def __init__(self, source: str | None, special_texts: Mapping[str, str]) -> None:
        """A source that does not compile is reported by `render`: the model runs without its template, too."""
        self._special_texts = dict(special_texts)
        self._template: Template | None = None
        self._problem = "the model has no chat template (send a plain prompt, or add chat_template.jinja to the model)"
        if source is not None:
            try:
                self._template = _compile(source)
            except ChatTemplateError as error:
                self._problem = str(error)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a chat.

        Args:
            messages: [{"role": ..., "content": ...}, ...] as plain JSON. Content that is a list of
                {"type": "text", "text": ...} parts reaches the template as their texts, a line break between.
            add_generation_prompt: end with the words that open the assistant's turn.
        Raises:
            InvalidPrompt: the messages are not of that form.
            ChatTemplateError: there is no template, or it refuses the messages, fails, or breaks its limits.
        """
        chat = checked_messages(messages)
        if self._template is None:
            raise ChatTemplateError(self._problem)
        variables = {
            **self._special_texts,
            "messages": chat,
            "add_generation_prompt": bool(add_generation_prompt),
            "tools": None,
            "documents": None,
            METER: Meter(num_messages=len(chat), input_chars=_num_chars(chat)),
        }
        try:
            return self._template.render(variables)
        except BudgetExceeded as error:
            raise ChatTemplateError(f"the chat template was stopped: {error}") from error
        except SecurityError as error:
            raise ChatTemplateError(f"the chat template reached for what it may not: {error}") from error
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error
        except RecursionError as error:
            raise ChatTemplateError("the chat template was stopped: it calls itself too deeply") from error
        except Exception as error:  # a template can raise whatever Python's operators can
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of chat messages as plain JSON, each with a role and a content.

    Raises:
        InvalidPrompt: naming the message and what is wrong with it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidPrompt(f"messages are a {type(messages).__name__}; they are a list of role and content")
    if not messages:
        raise InvalidPrompt("messages are empty; a chat has at least one")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidPrompt(f"{where} is a {type(message).__name__}; it is a mapping with a role and a content")
    checked: dict[str, Any] = _plain(message, where, MAX_MESSAGE_DEPTH)
    role = checked.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidPrompt(f"{where} has no role; it is a string such as 'system', 'user' or 'assistant'")
    content = checked.get("content")
    if content is None and checked.get("tool_calls"):
        return checked
    if isinstance(content, list):
        checked["content"] = "\n".join(_part_text(part, f"{where}['content'][{i}]") for i, part in enumerate(content))
    elif not isinstance(content, str):
        kind = "missing" if "content" not in checked else f"a {type(content).__name__}"
        raise InvalidPrompt(f"{where}['content'] is {kind}; it is a string, or a list of text parts")
    return checked


def _part_text(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidPrompt(f'{where} is not {{"type": "text", "text": "..."}}; this engine reads text only')


def _plain(value: object, where: str, depth: int) -> Any:
    """The value rebuilt of exact JSON types, so that no method of a caller's class is within a template's reach."""
    if depth == 0:
        raise InvalidPrompt(f"{where} nests deeper than {MAX_MESSAGE_DEPTH} levels (flatten it)")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidPrompt(f"{where} has the key {key!r}; keys are strings")
        return {str(key): _plain(item, f"{where}[{key!r}]", depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", depth - 1) for i, item in enumerate(value)]
    raise InvalidPrompt(f"{where} is a {type(value).__name__}; messages are plain JSON")


def _num_chars(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_num_chars(item) for item in value.values())
    if isinstance(value, list):
        return sum(map(_num_chars, value))
    return len(value) if isinstance(value, str) else 1


def _compile(source: str) -> Template:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ChatTemplateError(
            f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} (shorten chat_template)"
        )
    try:
        return compile_template(source)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template does not parse: {error.message} (line {error.lineno})") from error
    except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        raise ChatTemplateError(f"the chat template does not compile: {type(error).__name__}: {error}") from error
