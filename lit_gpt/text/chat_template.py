"""Chat templates: Jinja source that comes with a download, rendered as transformers' `apply_chat_template` renders it,
in a sandbox and within limits.

The sandbox keeps a template to its variables: private attributes and whatever changes a value are refused. The limits
end a template that does not end by itself or that grows without bound.
"""

import json
import resource
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 1_000_000  # turns of loops and calls of macros in one rendering
MAX_BITS = 10_000  # of a whole number that arithmetic makes
MAX_BYTES = 256 * 2**20  # that one rendering may take
OPEN, CLOSE = (f"\U0010fffd{secrets.token_hex(8)}{end}\U0010fffd" for end in "[]")  # around what a model generates


class TooLarge(TemplateError):
    """The template exceeds a limit."""


class Template:
    """A compiled template.

    Attributes:
        tagged: whether it marks what a model generates, by `{% generation %} ... {% endgeneration %}`.

    Raises:
        TemplateError: the source is not a template.
    """

    def __init__(self, source: str) -> None:
        self._sandbox = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        with memory_limit(MAX_BYTES):  # what is constant is computed here
            self._compiled = self._sandbox.from_string(source)
        self.tagged = self._sandbox.tagged

    def render(self, **variables: Any) -> str:
        """Return the text that the template makes of these variables.

        Raises:
            Exception: whatever the template's code can do wrong; SecurityError and TooLarge for what is not allowed.
        """
        self._sandbox.steps = 0
        try:
            with memory_limit(MAX_BYTES):
                return self._compiled.render(**variables)
        except MemoryError:
            raise TooLarge(f"it takes more than {MAX_BYTES >> 20} MB of memory") from None
        except RecursionError:
            raise TooLarge("its macros call each other without end") from None

    def generated(self, **variables: Any) -> list[tuple[int, int]] | None:
        """Return the stretches of the text, from and to which character, that lie between generation tags.

        None: the template has no such tags, or makes the text from what stands between them, so that it has no place.
        """
        if not self.tagged:
            return None
        plain = self.render(**variables)
        self._sandbox.marking = True
        try:
            marked = self.render(**variables)
        finally:
            self._sandbox.marking = False
        spans, at = [], 0
        for i, piece in enumerate(marked.replace(CLOSE, OPEN).split(OPEN)):
            spans += [(at, at + len(piece))] if i % 2 else []
            at += len(piece)
        return spans if marked.replace(OPEN, "").replace(CLOSE, "") == plain else None


class Generation(Extension):
    """The tag `{% generation %}`, by which a template shows what of its text a model generates."""

    tags = {"generation"}
    environment: "Sandbox"

    def parse(self, parser: Parser) -> nodes.Node:
        self.environment.tagged = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("between"), [], [], body).set_lineno(line)

    def between(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE if self.environment.marking else caller()


class CountedCode(CodeGenerator):
    """Begins the body of each loop and macro with a call of `Sandbox.step`."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        count(node)
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:
        count(node)
        super().visit_Macro(node, frame)


def count(node: nodes.For | nodes.Macro) -> None:
    """Put a call of `Sandbox.step` before the body of a loop or macro."""
    step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
    node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))


class Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = CountedCode
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        self.steps, self.tagged, self.marking = 0, False, False
        super().__init__(**options)
        self.filters["tojson"] = to_json
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": lambda *args, **values: dict(*args, **values),
            "namespace": namespace,
        }
        del self.globals["lipsum"]

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooLarge(f"its loops turn more than {MAX_STEPS:,} times")

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"it reaches for '{attribute}' of a {type(obj).__name__}, which is not allowed")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TooLarge(f"it computes a number of more than {MAX_BITS:,} bits")
        return super().call_binop(context, operator, left, right)


class Names(Namespace):
    """A namespace without the names that Python itself looks up."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"it sets '{name}' of a namespace, which is not allowed")
        super().__setitem__(name, value)


def namespace(*args: Any, **values: Any) -> Names:
    names = Names()
    for name, value in dict(*args, **values).items():
        names[name] = value
    return names


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Spell a value in JSON without escaping it for HTML, as Jinja's own filter would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let this process take at most so many bytes more: what exceeds them raises MemoryError. On Linux only."""
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = size + more if soft == resource.RLIM_INFINITY else min(size + more, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
