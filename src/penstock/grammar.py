"""What a `Constraint` means, as an llguidance grammar. Shared by service and engine.

The service validates and the engine compiles; both go through here, so what the service accepted is
what the engine runs. Needs llguidance only, no torch.
"""

from __future__ import annotations

import json

from llguidance import LLMatcher, LLParserLimits

from penstock.protocol.request import Constraint

#: Whitespace between JSON tokens: one space, or a line break and its indentation. It may stand once
#: at each place, so a small model cannot go on producing blanks for ever.
JSON_WHITESPACE = r"[ ]|\r?\n[ \t]{0,24}"
_JSON_DEFAULTS = {"whitespace_pattern": JSON_WHITESPACE}


def limits() -> LLParserLimits:
    """Bounds on one grammar: a few hundred ms to compile, about 20 ms a mask, tens of MB."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=250_000,
        verbose_errors=False,
    )


def to_grammar(constraint: Constraint) -> str:
    """The llguidance grammar of `constraint`.

    Raises ValueError when json_schema or choice is not the JSON it should be. Does not compile:
    errors of the schema, regex or grammar itself appear in the matcher.
    """
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
