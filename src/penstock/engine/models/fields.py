"""Typed reading of config.json: every complaint is one line that names file, field and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.protocol.errors import CheckpointError, UnsupportedModel

_ABSURD = 1e15


class Fields:
    """Values of a JSON object. A field that is absent or null takes the default, if there is one.

    Raises `CheckpointError` for what is missing, of the wrong type or absurd.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def names(self) -> list[str]:
        return list(self._values)

    def integer(
        self, name: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24
    ) -> int:
        value = self._or_default(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, value, "an integer")
        if not low <= value <= high:
            raise self.wrong(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self._or_default(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, value, "a number")
        if not above < value < _ABSURD:
            raise self.wrong(name, value, f"a number above {above:g} and below {_ABSURD:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._or_default(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._or_default(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def optional_integer(
        self, name: str, default: int | None = None, *, low: int = 1
    ) -> int | None:
        """Here an absent field takes the default, but null means None."""
        if name in self._values and self._values[name] is None:
            return None
        if name not in self._values and default is None:
            return None
        return self.integer(name, default, low=low)

    def strings(self, name: str) -> list[str]:
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, value, "a list of strings")
        return value

    def integers(self, name: str, count: int) -> list[int] | None:
        """A list of that many integers from 1; None if the field is absent or null."""
        value = self._values.get(name)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 1 for i in value)
        ):
            raise self.wrong(name, value, f"a list of {count} integers from 1")
        return value

    def child(self, name: str) -> Fields | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, f"{self.where}: {name}")

    def wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {_short(value)}, expected {wanted}")

    def unsupported(self, name: str, value: object, supported: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.where}: {name} = {_short(value)} is not supported; supported: {supported}"
        )

    def _or_default(self, name: str, default: object) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(
                f"{self.where}: {name} is missing: is this the config of a language model?"
            )
        return default


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
