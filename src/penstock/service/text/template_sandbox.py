"""Where chat templates run: jinja2's immutable sandbox, with a bound on work and on size.

The environment is the one that transformers documents for chat templates: trim_blocks and
lstrip_blocks, loop controls, the `generation` tag, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`. The sandbox keeps a template from Python's internals; it does not
keep it from looping, so each rendering has a budget of loop steps and calls, counted by rewriting
`for` when the template is compiled, and a cap on what it may build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from penstock.protocol.errors import TemplateFailed

MAX_STEPS = 1_000_000
MAX_CHARS = 16 << 20
MAX_BITS = 4096
_WIDTHS = re.compile(r"\d+")


class _TooMuch(TemplateError):
    """The template went over its budget."""


class _Budget:
    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise _TooMuch(f"the template takes more than {MAX_STEPS} steps")


_budget: ContextVar[_Budget] = ContextVar("chat_template_budget")


def _checked_size(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _TooMuch(f"the template makes a number of more than {MAX_BITS} bits")
    if isinstance(value, (str, list, tuple)) and len(value) > MAX_CHARS:
        raise _TooMuch(f"the template builds more than {MAX_CHARS} characters")
    return value


class _Metered(Extension):
    """Counts the steps of each `for`, and looks at the size of what `~` builds."""

    def count(self, iterable: Any) -> Any:
        budget = _budget.get()
        try:
            budget.spend(len(iterable))
        except TypeError:
            return self._count_each(iterable, budget)
        return iterable

    def sized(self, value: Any) -> Any:
        return _checked_size(value)

    @staticmethod
    def _count_each(iterable: Iterable[Any], budget: _Budget) -> Iterator[Any]:
        for item in iterable:
            budget.spend(1)
            yield item


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's turns for training."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own convention)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        metered = self.metered
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = metered.call_method("count", [_expr(loop.iter)], lineno=loop.lineno)
        _SizeConcat(metered).visit(tree)
        return tree

    @property
    def metered(self) -> _Metered:
        found = self.extensions[_Metered.identifier]
        assert isinstance(found, _Metered)
        return found

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _budget.get().spend(1)
        _check_method(__obj, args, kwargs)
        if isinstance(__obj, LoopContext) and args:  # a recursive loop, over something else
            args = (__self.metered.count(args[0]), *args[1:])
        return _checked_size(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for seq, times in ((left, right), (right, left)):
                if isinstance(seq, (str, list, tuple)) and isinstance(times, int):
                    _check_product(len(seq), times)
        if operator == "**" and isinstance(right, int) and abs(right) > 1024:
            raise _TooMuch("the template raises to a power beyond 1024")
        return _checked_size(super().call_binop(context, operator, left, right))


def _expr(node: nodes.Node) -> nodes.Expr:
    assert isinstance(node, nodes.Expr)
    return node


class _SizeConcat(NodeTransformer):
    """`a ~ b` becomes `sized(a ~ b)`."""

    def __init__(self, metered: Any) -> None:
        self._metered = metered

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        sized: nodes.Node = self._metered.call_method("sized", [node], lineno=node.lineno)
        return sized


def _check_product(length: int, times: int) -> None:
    if length * times > MAX_CHARS:
        raise _TooMuch(f"the template builds more than {MAX_CHARS} characters")


def _check_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse the string methods whose result can dwarf their arguments, before they run."""
    method = getattr(method, "__wrapped__", method)  # the sandbox wraps str.format
    owner = getattr(method, "__self__", None)
    if not isinstance(owner, str):
        return
    for value in (*args, *kwargs.values()):  # widths: center, ljust, zfill, format, expandtabs
        if isinstance(value, int):
            _check_product(1, value)
    name = method.__name__
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str):
        _check_product(owner.count(args[0]), len(args[1]))
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        _check_product(len(owner), len(args[0]))
    elif name in ("format", "format_map"):
        _check_widths(owner)


def _check_widths(layout: str) -> None:
    for width in _WIDTHS.findall(layout):
        _check_product(1, int(width[:18]))


def _guarded(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """A jinja filter behind a check of its arguments. `wraps` keeps jinja's marks on it."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        plain = args[1:] if hasattr(function, "jinja_pass_arg") else args
        check(*plain, **kwargs)
        return _checked_size(function(*args, **kwargs))

    return guarded


def _check_replace_filter(value: Any, old: str, new: str, count: int | None = None) -> None:
    _check_product(str(value).count(old), len(new))


def _check_join_filter(value: Any, d: str = "", attribute: Any = None) -> None:
    _check_product(len(d), len(value) if hasattr(value, "__len__") else 1)


def _check_width_filter(value: Any, width: Any = 0, *_: Any, **__: Any) -> None:
    lines = str(value).count("\n") + 1
    _check_product(lines, width if isinstance(width, int) else len(str(width)))


def _check_format_filter(value: Any, *args: Any, **kwargs: Any) -> None:
    _check_widths(str(value))
    for number in (*args, *kwargs.values()):
        if isinstance(number, int) and "*" in str(value):
            _check_product(1, number)


_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "replace": _check_replace_filter,
    "join": _check_join_filter,
    "center": _check_width_filter,
    "indent": _check_width_filter,
    "format": _check_format_filter,
}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Namespace(jinja2.utils.Namespace):
    """No names that Python itself gives a meaning to: a template could dress up as any object."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Metered, _Generation, loopcontrols]
    )
    for name, check in _FILTER_CHECKS.items():
        environment.filters[name] = _guarded(environment.filters[name], check)
    environment.filters["tojson"] = _tojson
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_shared = _environment()


class CompiledTemplate:
    """Raises `TemplateFailed` when the source is no template, or when rendering fails."""

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template: jinja2.Template = _shared.from_string(source)
        except jinja2.TemplateSyntaxError as exc:
            raise TemplateFailed(f"line {exc.lineno}: {exc.message}") from exc
        except RecursionError as exc:
            raise TemplateFailed("the template is nested too deeply") from exc

    def render(self, variables: Mapping[str, Any]) -> str:
        token = _budget.set(_Budget())
        try:
            return self._collect(variables)
        except SecurityError as exc:
            raise TemplateFailed(f"the chat template does what it may not: {exc.message}") from exc
        except TemplateError as exc:
            raise TemplateFailed(exc.message or type(exc).__name__) from exc
        except RecursionError as exc:
            raise TemplateFailed("the chat template recurses without end") from exc
        except Exception as exc:  # a template can raise anything Python can
            raise TemplateFailed(f"the chat template failed: {type(exc).__name__}: {exc}") from exc
        finally:
            _budget.reset(token)

    def _collect(self, variables: Mapping[str, Any]) -> str:
        out: list[str] = []
        size = 0
        for part in self._template.generate(**variables):
            size += len(part)
            if size > MAX_CHARS:
                raise _TooMuch(f"the template writes more than {MAX_CHARS} characters")
            out.append(part)
        return "".join(out)
