"""Bodies of /v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from penstock.service.api.requests import Count, GenerationRequest, NumLogprobs, TokenId
from penstock.service.api.requests_chat import Message, Tool

#: Sequences in one request: prompts times n.
MAX_SEQUENCES = 1024

# Which of text, ids, texts or lists of ids it is, is told apart in `completions.py`: msgspec holds
# at most one array type in a union.
Prompt = str | list[TokenId | str | list[TokenId]]


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: Prompt
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Either `prompt` or `messages`, as vLLM's /tokenize takes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Tool] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    tokens: list[TokenId]
    model: str | None = None
