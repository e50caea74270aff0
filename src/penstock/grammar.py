"""What a `Constraint` means, as an llguidance grammar. Shared by service and engine.

The service validates and the engine compiles; both go through here, so what the service accepted is
what the engine runs. Needs llguidance only, no torch.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from penstock.protocol.request import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

#: Whitespace between JSON tokens: one space, or a line break and its indentation. It may stand once
#: at each place, so a small model cannot go on producing blanks for ever.
JSON_WHITESPACE = r"[ ]|\r?\n[ \t]{0,24}"
_JSON_DEFAULTS: JsonCompileOptions = {"whitespace_pattern": JSON_WHITESPACE}

MAX_SCHEMA_BYTES = 256 * 1024
MAX_GRAMMAR_BYTES = 64 * 1024
#: Brackets, alternatives and lines. llguidance recurses over these: this many fit the stack below.
MAX_NODES = 4000
#: A grammar for multipleOf has as many states as the number (without its decimal point) says.
MAX_MULTIPLE_OF = 10_000
_STACK_BYTES = 256 * 1024 * 1024  # virtual; only what is used becomes memory

_MULTIPLE_OF = re.compile(r'"multipleOf"\s*:\s*([-+.\deE]+)')
_ESCAPED_ASCII = re.compile(r"\\u00([0-7][0-9a-fA-F])")
_stack_size_lock = threading.Lock()


def deep_stack_executor(name: str) -> ThreadPoolExecutor:
    """One thread with a stack deep enough for any grammar within the limits.

    llguidance overruns the usual 8 MB (and takes the process with it) at about a thousand levels of
    schemas or rules that refer to each other. Use it for whatever compiles or runs grammars that
    came from outside.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    with _stack_size_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            executor.submit(int).result()  # threads start with their first task
        finally:
            threading.stack_size(before)
    return executor


def limits() -> LLParserLimits:
    """Bounds on one grammar: about a second to compile, tens of ms and tens of MB to run."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=250_000,
        verbose_errors=False,
    )


def check_size(constraint: Constraint) -> None:
    """Raises ValueError for what could exhaust memory, stack or patience before a limit acts."""
    text = constraint.text
    is_schema = constraint.kind == "json_schema"
    allowed = MAX_SCHEMA_BYTES if is_schema or "%json" in text else MAX_GRAMMAR_BYTES
    size = len(text.encode("utf-8", errors="replace"))
    if size > allowed:
        raise ValueError(f"it has {size} bytes; at most {allowed} are allowed")
    nodes = sum(text.count(char) for char in ("{" if is_schema else "([{|\n"))
    if constraint.kind in ("json_schema", "lark") and nodes > MAX_NODES:
        raise ValueError(f"it has {nodes} nodes; at most {MAX_NODES} are allowed")
    plain = _ESCAPED_ASCII.sub(lambda found: chr(int(found[1], 16)), text)
    for found in _MULTIPLE_OF.finditer(plain):
        if _significand(found[1]) > MAX_MULTIPLE_OF:
            raise ValueError(f"multipleOf {found[1]} is too fine: at most {MAX_MULTIPLE_OF} steps")


def _significand(number: str) -> int:
    try:
        _, digits, exponent = Decimal(number).normalize().as_tuple()
    except InvalidOperation:
        return 0  # not a number: the schema compiler will say so
    assert isinstance(exponent, int)
    zeros = min(max(exponent, 0), 10)
    return int("".join(map(str, digits)) + "0" * zeros)


def to_grammar(constraint: Constraint) -> str:
    """The llguidance grammar of `constraint`.

    Raises ValueError when it is too large, or json_schema or choice is not the JSON it should be.
    Does not compile: errors of the schema, regex or grammar itself appear in the matcher.
    """
    check_size(constraint)
    match constraint.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(constraint.text, defaults=_JSON_DEFAULTS)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON_DEFAULTS)
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "lark":
            return LLMatcher.grammar_from_lark(constraint.text)
        case "choice":
            return LLMatcher.grammar_from_lark(_choice(constraint.text))
        case _:
            raise ValueError(f"unknown kind of constraint: {constraint.kind!r}")


def _choice(text: str) -> str:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices:
        raise ValueError("choice needs a list with at least one string")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("every choice must be a string that is not empty")
    # One terminal rather than one rule each: the parser then sees a single lexeme.
    options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return f"start: CHOICE\nCHOICE: {options}"


def build_tokenizer(
    tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """llguidance's view of a tokenizer.json. Takes about a second for 152k ids; keep it."""
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)


def error_text(message: str) -> str:
    """llguidance's message without its backtraces and source excerpts, at most 400 characters."""
    lines = message.split("\n<", 1)[0].strip()
    return lines if len(lines) <= 400 else lines[:397] + "..."
