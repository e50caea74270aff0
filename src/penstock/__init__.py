"""Penstock: an LLM inference framework. A service that understands people, an engine for tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.llm import LLM
    from penstock.sampling_params import SamplingParams

PROJECT = "penstock"
__version__ = "0.1.0"
__all__ = ["LLM", "PROJECT", "SamplingParams", "__version__"]

#: Imported when first asked for: `LLM` brings torch with it, which the service does without.
_LAZY = {"LLM": "penstock.llm", "SamplingParams": "penstock.sampling_params"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
