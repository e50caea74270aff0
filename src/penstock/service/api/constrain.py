"""What the output must match, from whichever of the fields asks for it."""

from __future__ import annotations

from typing import Any

from penstock.protocol.request import Constraint
from penstock.service.api.requests import GenerationRequest


def constraint_of(
    request: GenerationRequest,
    tools: list[dict[str, Any]] | None = None,
    tool_choice: str = "auto",
    parallel_tool_calls: bool = True,
) -> Constraint | None:
    """Raises `InvalidConstraint` for what does not compile, `InvalidRequest` for two at once."""
    return None
