"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.protocol.errors import InvalidRequest
from penstock.service.api.body import decode, read_body
from penstock.service.api.context import Context
from penstock.service.api.requests_chat import template_messages, template_tools
from penstock.service.api.requests_completion import DetokenizeRequest, TokenizeRequest
from penstock.service.api.responses import DetokenizeResponse, TokenizeResponse
from penstock.service.api.sampling import check_ids

_tokenize = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)


class TokenizeEndpoint:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, http: Request) -> Response:
        context = self._context
        body = await read_body(http.scope, http.receive, context.config.max_body_bytes)
        request = decode(body, _tokenize)
        context.model(request.model)
        card = context.card()
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("give either 'prompt' or 'messages'", param="prompt")
        text, special = request.prompt, request.add_special_tokens
        if text is None:
            text = self._render(request)
        # A chat template writes its special tokens itself.
        add_special = request.messages is None if special is None else special
        tokenizer = context.texts.tokenizer
        ids = await tokenizer.encode_async(text, add_special)
        strings = [tokenizer.token(i) or "" for i in ids] if request.return_token_strs else None
        found = TokenizeResponse(len(ids), card.max_model_len, ids, strings)
        return Response(msgspec.json.encode(found), media_type="application/json")

    def _render(self, request: TokenizeRequest) -> str:
        continues = bool(request.continue_final_message)
        return self._context.template(request.chat_template).render(
            template_messages(request.messages or []),
            tools=template_tools(request.tools) if request.tools else None,
            add_generation_prompt=request.add_generation_prompt is not False and not continues,
            continue_final_message=continues,
            kwargs=request.chat_template_kwargs,
        )


class DetokenizeEndpoint:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, http: Request) -> Response:
        context = self._context
        body = await read_body(http.scope, http.receive, context.config.max_body_bytes)
        request = decode(body, _detokenize)
        context.model(request.model)
        check_ids(request.tokens, context.card().vocab_size, "tokens")
        text = context.texts.tokenizer.decode(request.tokens, skip_special_tokens=False)
        return Response(
            msgspec.json.encode(DetokenizeResponse(text)), media_type="application/json"
        )
