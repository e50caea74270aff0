"""Penstock: an LLM inference framework. A service that understands people, an engine for tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.llm import LLM
    from penstock.sampling_params import SamplingParams

PROJECT = "penstock"
__version__ = "0.1.0"
__all__ = ["LLM", "PROJECT", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` brings torch with it, so it is imported when first asked for."""
    if name == "LLM":
        from penstock.llm import LLM

        return LLM
    if name == "SamplingParams":
        from penstock.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
