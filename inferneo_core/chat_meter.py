"""What a chat template pays for each operation, and how much one rendering may spend."""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterable, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

# One rendering may visit so many nodes and items, about a second of CPython, and handle so many characters ...
MAX_STEPS = 1_000_000
MAX_CHARS = 1 << 25
# ... beside what the messages themselves call for.
STEPS_PER_MESSAGE = 1000
CHARS_PER_INPUT_CHAR = 64
MAX_INT_BITS = 4096


class BudgetExceeded(TemplateError):
    """The template ran past its steps, its characters or its integers."""


class Meter:
    """What one rendering may still spend."""

    def __init__(self, num_messages: int, input_chars: int) -> None:
        self.steps = MAX_STEPS + STEPS_PER_MESSAGE * num_messages
        self.chars = MAX_CHARS + CHARS_PER_INPUT_CHAR * input_chars

    def spend(self, steps: int, chars: int = 0) -> None:
        """Raises BudgetExceeded when less than this is left."""
        self.steps -= abs(steps)  # abs: a template that names "<tick>" in a filter must not earn
        self.chars -= abs(chars)
        if self.steps < 0:
            raise BudgetExceeded(f"it runs for more than {MAX_STEPS} steps (does it loop without end?)")
        if self.chars < 0:
            raise BudgetExceeded(f"it handles more than {MAX_CHARS} characters, beside those of the messages")

    def weigh(self, *values: Any) -> None:
        """Pays for reading all of the values: a step an element, a character each.

        A list that holds one string a thousand times pays for it a thousand times, as printing it would.
        """
        pending = list(values)
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                self.spend(1, len(item))
            elif isinstance(item, Mapping):
                self.spend(1 + 2 * len(item))
                pending.extend(item.keys())
                pending.extend(item.values())
            elif isinstance(item, (list, tuple, KeysView, ValuesView, ItemsView)):
                self.spend(1 + len(item))
                pending.extend(item)
            elif isinstance(item, range):
                self.spend(1 + len(item))
            else:
                self.spend(1)

    def weigh_arguments(self, values: Iterable[Any]) -> None:
        """As `weigh`, with integers at their face: one may be a width or a count."""
        for value in values:
            self.weigh(value)
            if isinstance(value, int):
                self.spend(0, value)

    def weigh_format(self, text: str, values: Iterable[Any]) -> None:
        """Pays for `text % values` and `text.format(*values)`: every field may show every value, in its width."""
        if re.search(r"\{[^}]*\{", text.replace("{{", "")):
            raise SecurityError("a format may not take its width from a value (write the width out)")
        before = self.chars
        self.weigh_arguments(values)
        self.spend(1, (before - self.chars) * (text.count("%") + text.count("{")) + len(text))
        self.spend(1, sum(int(width[:12]) for width in re.findall(r"[0-9]+", text)))

    def read(self, value: Any) -> None:
        """Pays for a copy of one text or list, not of what the list holds."""
        length = len(value) if hasattr(value, "__len__") else 1
        self.spend(1 if isinstance(value, str) else 1 + length, length)

    def replace(self, text: str, values: Sequence[Any]) -> None:
        """Pays for `text.replace(old, new)`."""
        self.weigh_arguments((text, *values))
        if len(values) > 1 and isinstance(values[0], str) and isinstance(values[1], str):
            self.spend(1, text.count(values[0]) * len(values[1]))

    def join(self, separator: str, values: Any) -> None:
        """Pays for `separator.join(values)`."""
        self.weigh(values)
        self.spend(1, len(separator) * (len(values) if hasattr(values, "__len__") else 1))

    def indent(self, text: str, values: Sequence[Any]) -> None:
        """Pays for putting a width, or a text, in front of every line."""
        width = values[0] if values else 4
        self.weigh_arguments((text, *values))
        self.spend(1, (1 + text.count("\n")) * (width if isinstance(width, int) else len(str(width))))

    def multiply(self, left: Any, right: Any) -> None:
        """Pays for a text or list repeated."""
        sequence, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(times, int) and hasattr(sequence, "__len__"):
            size = len(sequence) * max(times, 0)
            self.spend(1 if isinstance(sequence, str) else 1 + size, size)


def check_bits(operator: str, left: int, right: int) -> None:
    """Raises BudgetExceeded when `left operator right` is an integer of more than MAX_INT_BITS bits."""
    bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 1)}
    if bits.get(operator, max(left.bit_length(), right.bit_length())) > MAX_INT_BITS:
        raise BudgetExceeded(f"{operator} makes an integer of more than {MAX_INT_BITS} bits")


def charge_filter(meter: Meter, name: str, value: Any, given: Sequence[Any]) -> None:
    """Pays for `value | name(*given)`."""
    if name == "replace":
        meter.replace(str(value), given)
    elif name == "join":
        meter.join(str(given[0]) if given else "", value)
    elif name == "indent":
        meter.indent(str(value), given)
    elif name == "format":
        meter.weigh_format(str(value), given)
    elif name == "round":
        check_bits("**", 10, max((arg for arg in given if isinstance(arg, int)), default=0))
    else:
        meter.weigh(value)
        meter.weigh_arguments(given)


def charge_method(meter: Meter, target: Any, name: str, given: Sequence[Any]) -> None:
    """Pays for `target.name(*given)`."""
    if isinstance(target, str):
        if name == "replace":
            meter.replace(target, given)
        elif name == "join" and given:
            meter.join(target, given[0])
        else:
            meter.weigh(target)
            meter.weigh_arguments(given)
    else:
        meter.weigh(*given)
        if isinstance(target, (list, tuple)):  # count and index compare every element
            meter.weigh(target)
