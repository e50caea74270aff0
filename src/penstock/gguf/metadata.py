"""Typed reading of a GGUF file's metadata: a complaint names the file, the key and the value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.protocol.errors import CheckpointError, UnsupportedModel


class Metadata:
    """A value that is absent takes the default; without a default it must be there.

    Raises `CheckpointError` for what is missing or of the wrong type.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._or_default(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._or_default(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        return self._list(key, str, "strings")

    def integers(self, key: str) -> list[int]:
        return self._list(key, int, "integers")

    def numbers(self, key: str) -> list[float]:
        return self._list(key, float, "floats")

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} is {self._shown(key)}, expected {wanted}")

    def unsupported(self, key: str, supported: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.path}: {key} = {self._shown(key)} is not supported; supported: {supported}"
        )

    def _list(self, key: str, kind: type, kinds: str) -> list[Any]:
        value = self._or_default(key, None)
        if not isinstance(value, list) or (value and type(value[0]) is not kind):
            raise self.wrong(key, f"a list of {kinds}")
        return value

    def _or_default(self, key: str, default: object) -> Any:
        if key in self._values:
            return self._values[key]
        if default is None:
            raise CheckpointError(f"{self.path}: its metadata lacks {key}")
        return default

    def _shown(self, key: str) -> str:
        text = repr(self._values.get(key))
        return text if len(text) <= 80 else text[:79] + "…"
