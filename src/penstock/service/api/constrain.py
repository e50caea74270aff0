"""What the output must match, from whichever of the fields asks for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.protocol.errors import InvalidRequest
from penstock.protocol.request import Constraint
from penstock.service.api.requests import GenerationRequest
from penstock.service.text.constraints import (
    for_tools,
    from_guided,
    from_response_format,
    validate_async,
)
from penstock.service.text.tokenizer import Tokenizer
from penstock.service.text.tools import HermesToolParser

_GUIDED = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
#: Constraints known to compile; clients send the same few again and again.
_MAX_REMEMBERED = 256


class Constraints:
    def __init__(self, tokenizer: Tokenizer) -> None:
        found = {tag: tokenizer.token_to_id(tag) for tag in HermesToolParser.tags}
        self._tag_ids = {tag: token_id for tag, token_id in found.items() if token_id is not None}
        self._compiles: OrderedDict[Constraint, None] = OrderedDict()

    async def of(
        self,
        request: GenerationRequest,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
    ) -> Constraint | None:
        """Raises `InvalidConstraint` if it does not compile, `InvalidRequest` for two at once."""
        given = {name: msgspec.to_builtins(getattr(request, name)) for name in _GUIDED}
        guided = next((name for name, value in given.items() if value is not None), "guided_json")
        asked = {
            "response_format": from_response_format(msgspec.to_builtins(request.response_format)),
            guided: from_guided(given),
            "tool_choice": for_tools(
                tools,
                tool_choice,
                tag_ids=self._tag_ids,
                parallel_tool_calls=parallel_tool_calls,
            ),
        }
        wanted = {param: found for param, found in asked.items() if found is not None}
        if len(wanted) > 1:
            raise InvalidRequest(
                f"only one of {', '.join(wanted)} can decide what is written", param=[*wanted][-1]
            )
        for param, constraint in wanted.items():
            await self._check(constraint, "tools" if param == "tool_choice" else param)
            return constraint
        return None

    async def _check(self, constraint: Constraint, param: str) -> None:
        if constraint in self._compiles:
            self._compiles.move_to_end(constraint)
            return
        await validate_async(constraint, param=param)
        self._compiles[constraint] = None
        if len(self._compiles) > _MAX_REMEMBERED:
            self._compiles.popitem(last=False)
