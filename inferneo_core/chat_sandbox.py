"""The jinja2 environment in which chat templates run: sandboxed, and metered.

A template comes with a model, so it is not to be trusted. jinja2's sandbox keeps it from Python's insides; the meter
keeps it from running for ever and from filling the memory. It needs no clock, thread or signal, so the same template
and messages always fare the same. Every operation pays before it runs:

- each pass of a loop, and each call of a macro or block, pays a step for every node of its body;
- operators, filters, tests and methods pay for the size of what they read, and of what they make where it is larger.

What cannot be priced is not offered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from inferneo_core.chat_meter import Meter, charge_filter, charge_method, check_bits

CALL_STEPS = 4  # a call costs what four other nodes do
METER = "<meter>"  # the context's name for the Meter: one that no template can spell


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _names(
    "abs attr capitalize center count d default dictsort e escape first float format groupby indent int items join "
    "last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string "
    "title trim unique upper wordcount"
)
_CHEAP_FILTERS = _names("attr count d default first last length items")  # their cost has no size in it
_COSTLY_TESTS = _names("in == eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le")
_STR_METHODS = _names(
    "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier "
    "islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, _names("get items keys values")),
    (list, _names("count index")),
    (tuple, _names("count index")),
    (LoopContext, _names("changed cycle")),
)


def compile_template(source: str) -> Template:
    """Compiles a chat template. Render it with a Meter under the name METER.

    Raises:
        jinja2.TemplateError, RecursionError, SyntaxError: it is not a template, or nests too deeply.
    """
    environment = ChatEnvironment()
    tree = _Instrumenter().visit(environment.parse(source))
    tree.set_environment(environment)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


class GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateNamespace(Namespace):
    """jinja2's namespace, closed to names with a leading underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set {name!r} (rename it, without the leading underscore)")
        super().__setitem__(name, value)


class _BoundFormat:
    """str.format of one text: what the sandbox gives for it, and the text, to price it by."""

    def __init__(self, text: str, sandboxed: Callable[..., str]) -> None:
        self.text, self.sandboxed = text, sandboxed

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self.sandboxed(*args, **kwargs)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """jinja2 as Hugging Face's chat templates expect it, metered."""

    intercepted_binops = frozenset(("+", "-", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = (loopcontrols, GenerationTag)
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_finalize)
        plain = ImmutableSandboxedEnvironment()
        self.filters = {name: _metered_filter(plain, name) for name in _FILTERS}
        self.filters |= {"tojson": _tojson, "<tick>": _tick, "<concat>": _concat, "<weigh>": _weigh, "<read>": _read}
        self.tests |= {name: _metered_test(plain, name) for name in _COSTLY_TESTS}
        self.globals.clear()
        self.globals |= {"range": plain.globals["range"], "dict": dict, "namespace": TemplateNamespace}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._functions = tuple(self.globals.values())

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # its hash has no bound
            raise SecurityError("a template may not look up a tuple (use a string or a number)")
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is not a template's to read")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        sandboxed = super().wrap_str_format(value)
        return None if sandboxed is None else _BoundFormat(value.__self__, sandboxed)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Only what the template itself defines, the globals, and methods of known cost."""
        meter: Meter = context[METER]
        meter.spend(CALL_STEPS)
        given = [*args, *(value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars"))]
        target, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(function, _BoundFormat):
            meter.weigh_format(function.text, given)
        elif any(function is known for known in self._functions):
            meter.weigh_arguments(given)
        elif any(isinstance(target, kind) and name in methods for kind, methods in _METHODS):
            charge_method(meter, target, name, given)
        elif not isinstance(function, (Macro, LoopContext, BlockReference, Undefined)):
            raise SecurityError(f"a template may not call {name or type(function).__name__!r}")
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter: Meter = context[METER]
        if isinstance(left, int) and isinstance(right, int):
            check_bits(operator, left, right)
        elif operator == "%":
            meter.weigh_format(str(left), right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            meter.multiply(left, right)
        else:
            meter.read(left)
            meter.read(right)
        return super().call_binop(context, operator, left, right)


class _Instrumenter(NodeTransformer):
    """Puts a payment at the head of every body that can run more than once, and around what jinja2 runs natively."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        test_tick = None if node.test is None else _tick_node([node.test])
        self._with_tick(node)
        if node.test is not None:
            node.test = nodes.And(test_tick, node.test, lineno=node.lineno)
        return node

    def _with_tick(self, node: Any) -> nodes.Node:
        payment = nodes.ExprStmt(_tick_node(node.body), lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, payment)
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _with_tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "<concat>")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "<weigh>")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "<weigh>")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _filter(node.key, "<weigh>")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "<read>")
        return node


def _filter(node: nodes.Expr, name: str, *args: int) -> nodes.Expr:
    if isinstance(node, nodes.Const) and name == "<weigh>":
        return node
    constants = [nodes.Const(value, lineno=node.lineno) for value in args]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _tick_node(body: list[nodes.Node]) -> nodes.Expr:
    """Pays for one pass through `body`: a step a node, and the characters of its literal text."""
    inside = [node for root in body for node in (root, *root.find_all(nodes.Node))]
    literal = sum(len(node.data) for node in inside if isinstance(node, nodes.TemplateData))
    return _filter(nodes.Const(True, lineno=body[0].lineno if body else 1), "<tick>", 1 + len(inside), literal)


@pass_context
def _tick(context: Context, value: Any, steps: int, chars: int) -> Any:
    context[METER].spend(steps, chars)
    return value


@pass_context
def _weigh(context: Context, value: Any) -> Any:
    context[METER].weigh(value)
    return value


_finalize = _weigh  # what is printed is read in full


@pass_context
def _read(context: Context, value: Any) -> Any:
    context[METER].read(value)
    return value


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    context[METER].weigh(values)
    return "".join(map(str, values))


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps, not jinja2's own: the text is for a model, so nothing is escaped for HTML."""
    meter: Meter = context[METER]
    meter.weigh_arguments((value, indent))
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    chunks = []
    for chunk in encoder.iterencode(value):
        meter.spend(1, len(chunk))
        chunks.append(chunk)
    return "".join(chunks)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256:
        raise SecurityError(f"a date format has {len(pattern)} characters; at most 256")
    return datetime.now().strftime(pattern)


def _metered_filter(plain: ImmutableSandboxedEnvironment, name: str) -> Callable[..., Any]:
    """jinja2's filter, paid for first; what it would yield one by one is a list, so that nothing runs unpaid later."""

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = context[METER]
        meter.spend(CALL_STEPS)
        if name not in _CHEAP_FILTERS:
            charge_filter(meter, name, value, [*args, *kwargs.values()])
        result = plain.call_filter(name, value, args, kwargs, context, context.eval_ctx)
        return list(result) if isinstance(result, Iterator) else result

    return metered


def _metered_test(plain: ImmutableSandboxedEnvironment, name: str) -> Callable[..., bool]:
    @pass_context
    def metered(context: Context, value: Any, *args: Any) -> bool:
        context[METER].weigh(value, *args)
        return bool(plain.call_test(name, value, args, {}, context, context.eval_ctx))

    return metered
