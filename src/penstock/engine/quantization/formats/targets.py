"""Which modules a list of names, regular expressions ("re:...") and classes means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from penstock.engine.models.fields import Fields


@dataclass(frozen=True, slots=True)
class Targets:
    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def parse(cls, fields: Fields, name: str) -> Targets:
        """Raises `CheckpointError` for what is no list of strings or no regular expression."""
        names: list[str] = []
        patterns = []
        for text in fields.strings(name):
            if not text.startswith("re:"):
                names.append(text)
                continue
            try:
                patterns.append(re.compile(text.removeprefix("re:")))
            except re.error as exc:
                raise fields.wrong(name, text, f"a regular expression ({exc})") from exc
        return cls(frozenset(names), tuple(patterns))

    def match(self, module: str) -> int:
        """How closely `module` is meant: 3 by name, 2 by an expression, 1 by its class, 0 not."""
        if module in self.names:
            return 3
        if any(pattern.match(module) for pattern in self.patterns):
            return 2
        return int(class_of(module) in self.names)


def class_of(module: str) -> str:
    """torch's name for what a module is."""
    return "Embedding" if module.endswith("embed_tokens") else "Linear"
