"""Recognise one JSON value (RFC 8259) as its text arrives.

The scanner says where the value ends and whether it is one; it builds nothing, so a caller can pass
the text on while it is still incomplete. Strict: what it accepts, `json.loads` accepts.
"""

from __future__ import annotations

import re

WHITESPACE = " \t\n\r"
MAX_DEPTH = 128

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # string content without escapes
_HEX = frozenset("0123456789abcdefABCDEF")
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}

# Numbers: state -> character class -> state. "0" stands for a leading zero, "9" for any digit.
_NUMBER: dict[str, dict[str, str]] = {
    "-": {"0": "zero", "9": "int"},
    "zero": {".": "point", "e": "exp"},
    "int": {"0": "int", "9": "int", ".": "point", "e": "exp"},
    "point": {"0": "frac", "9": "frac"},
    "frac": {"0": "frac", "9": "frac", "e": "exp"},
    "exp": {"+": "sign", "0": "power", "9": "power"},
    "sign": {"0": "power", "9": "power"},
    "power": {"0": "power", "9": "power"},
}
_NUMBER_ENDS = frozenset(("zero", "int", "frac", "power"))
_CLASS = {
    "0": "0", **dict.fromkeys("123456789", "9"), ".": ".", "e": "e", "E": "e", "+": "+", "-": "+",
}  # fmt: skip


class JsonScanner:
    """`feed` until `done` or `failed`. The first character fed must begin the value."""

    __slots__ = ("_closers", "_rest", "_state", "done", "failed")

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._state = "value"
        self._closers: list[str] = []  # "}" or "]" for each open container
        self._rest = ""  # of a literal; the number's state; the kind of string

    def feed(self, text: str, start: int = 0) -> int:
        """Read on from `start`; returns the position after the last character taken.

        A number at top level ends only with the character behind it, which is not taken. The
        character that makes the text invalid is not taken either.
        """
        position = start
        while position < len(text) and not self.done and not self.failed:
            if self._state == "string":
                run = _PLAIN.match(text, position)
                if run is not None:
                    position = run.end()
                    continue
            if self._take(text[position]):
                position += 1
        return position

    def _take(self, char: str) -> bool:
        """Advance by one character; False if it is not taken (look at `done` and `failed`)."""
        state = self._state
        if state == "string":
            return self._in_string(char)
        if state == "escape":
            self._state, self._rest = ("hex", "4") if char == "u" else ("string", "")
            return char in '"\\/bfnrtu' or self._fail()
        if state == "hex":
            left = int(self._rest) - 1
            self._state, self._rest = ("hex", str(left)) if left else ("string", "")
            return char in _HEX or self._fail()
        if state == "literal":
            if char != self._rest[0]:
                return self._fail()
            self._rest = self._rest[1:]
            return self._rest != "" or self._value_ends()
        if state == "number":
            return self._in_number(char)
        if char in WHITESPACE and self._closers:
            return True
        return self._between(state, char)

    def _between(self, state: str, char: str) -> bool:
        """Structure: what may stand between the scalars."""
        if state in ("value", "value_or_end"):
            if state == "value_or_end" and char == "]":
                return self._close()
            return self._value_begins(char)
        if state in ("key", "key_or_end"):
            if state == "key_or_end" and char == "}":
                return self._close()
            if char != '"':
                return self._fail()
            self._state = "string"
            self._closers.append(":")  # a key: a colon must follow the string
            return True
        if state == "colon":
            self._state = "value"
            return char == ":" or self._fail()
        assert state == "comma_or_end"
        if char == self._closers[-1]:
            return self._close()
        self._state = "key" if self._closers[-1] == "}" else "value"
        return char == "," or self._fail()

    def _value_begins(self, char: str) -> bool:
        if char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self._state = "key_or_end" if char == "{" else "value_or_end"
            return len(self._closers) <= MAX_DEPTH or self._fail()
        if char == '"':
            self._state = "string"
        elif char in _LITERALS:
            self._state, self._rest = "literal", _LITERALS[char]
        elif char == "-" or (char.isascii() and char.isdigit()):
            self._state = "number"
            self._rest = {"-": "-", "0": "zero"}.get(char, "int")
        else:
            return self._fail()
        return True

    def _in_string(self, char: str) -> bool:
        if char == "\\":
            self._state = "escape"
            return True
        if char != '"':
            return self._fail()  # a control character
        if self._closers and self._closers[-1] == ":":
            self._closers.pop()
            self._state = "colon"
            return True
        return self._value_ends()

    def _in_number(self, char: str) -> bool:
        following = _NUMBER[self._rest].get(_CLASS.get(char, ""))
        if following is not None:
            self._rest = following
            return True
        if self._rest not in _NUMBER_ENDS:
            return self._fail()
        self._value_ends()
        return False  # the character belongs to what follows

    def _close(self) -> bool:
        self._closers.pop()
        return self._value_ends()

    def _value_ends(self) -> bool:
        self._rest = ""
        self.done = not self._closers
        self._state = "comma_or_end"
        return True

    def _fail(self) -> bool:
        self.failed = True
        return False
