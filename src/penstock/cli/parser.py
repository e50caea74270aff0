"""Reading command lines: argparse with errors of ours, vLLM's habits, and help for the lost."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from penstock import PROJECT
from penstock.cli import vllm_flags
from penstock.protocol.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` instead of printing a usage text and leaving.

    Nothing has a default here (`argument_default=SUPPRESS`): what a namespace holds was said by
    somebody, so that what the command line says can go over what a file says.
    """

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"{PROJECT} {command}",
            description=description,
            epilog=epilog,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Like `parse_args`; unknown flags are explained. Raises `ConfigError`."""
        namespace, rest = self.parse_known_args([_with_dashes(word) for word in arguments])
        unknown = next((word for word in rest if word.startswith("-")), None)
        if unknown is not None:
            raise ConfigError(explain_unknown(unknown.partition("=")[0], self.flags()))
        if rest:
            raise ConfigError(f"{rest[0]!r} is one argument too many: see {self.prog} --help")
        return namespace

    def flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise ConfigError(f"{message}: see {self.prog} --help")


def explain_unknown(flag: str, known: Iterable[str]) -> str:
    """One sentence about a flag that is not ours: vLLM's are known by name, others by likeness."""
    known = list(known)
    if found := vllm_flags.find(flag):
        return f"{flag} is a flag of vLLM: {found.explain()}"
    return f"there is no flag {flag}{nearest(flag, known)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def _with_dashes(word: str) -> str:
    """--max_model_len=5 is --max-model-len=5, as in vLLM."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


_SUFFIXES = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def count(text: str) -> int:
    """A whole number of at least 1; as in vLLM, 1k is 1000 and 1K is 1024."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number (4096, 4k, 4K, 2GiB)")
    value = float(match[1]) * _SUFFIXES[match[2]] if "." in match[1] else (
        int(match[1]) * _SUFFIXES[match[2]]
    )  # fmt: skip
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(value)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value
