"""/v1/chat/completions: from messages to a run."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.protocol.request import Constraint
from penstock.service.api.body import decode, read_body
from penstock.service.api.chat_render import ChatRenderer
from penstock.service.api.context import Context, sequence_id
from penstock.service.api.requests_chat import (
    AssistantMessage,
    ChatRequest,
    NamedToolChoice,
    template_messages,
    template_tools,
)
from penstock.service.api.run import Job, Run
from penstock.service.api.sampling import check_common, make_sampling, text_options
from penstock.service.api.sse import respond
from penstock.service.generation import GenerationSpec
from penstock.service.text.pipeline import OutputPipeline
from penstock.service.text.tools import call_ids

_decoder = msgspec.json.Decoder(ChatRequest)


class ChatEndpoint:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, http: Request) -> Response:
        context = self._context
        trace = context.tracing.start(http.url.path, http.scope["headers"])
        body = await read_body(http.scope, http.receive, context.config.max_body_bytes)
        request = decode(body, _decoder)
        model = context.model(request.model)
        card = context.card()
        check(request)
        constraint = await context.constraints.of(
            request,
            offered_tools(request),
            msgspec.to_builtins(request.tool_choice),
            request.parallel_tool_calls is not False,
        )
        prompt_ids = await render_prompt(context, request)
        envelope = context.envelope("chatcmpl", model, card)
        job = self._job(request, prompt_ids, constraint, sequence_id(envelope))
        renderer = ChatRenderer(envelope, request, context.texts.tokenizer)
        run = Run([job], context.generator, context.metrics, trace)
        renderer.attach(run)
        return await respond(http, run, renderer, bool(request.stream))

    def _job(
        self,
        request: ChatRequest,
        prompt_ids: list[int],
        constraint: Constraint | None,
        request_id: str,
    ) -> Job:
        context, texts = self._context, self._context.texts
        tools = offered_tools(request)
        if tools and texts.tool_parser is None:
            raise UnsupportedFeature(
                "'tools' are not supported: the server was started with --tool-call-parser none",
                param="tools",
            )
        asked = request.max_completion_tokens
        sampling = make_sampling(
            request,
            card=context.card(),
            defaults=context.sampling_defaults,
            max_tokens=request.max_tokens if asked is None else asked,
            max_tokens_param="max_tokens" if asked is None else "max_completion_tokens",
            prompt_tokens=len(prompt_ids),
            prompt_param="messages",
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs,
            seed=context.seeds.next(),
        )
        spec = GenerationSpec(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            n=request.n or 1,
            constraint=constraint,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )
        options = text_options(request)

        def make_pipeline(choice: int) -> OutputPipeline:
            return texts.pipeline(
                prompt_ids,
                **options,
                tools=bool(tools),
                reasoning=True,
                new_call_id=call_ids(spec.request_id, choice),
            )

        return Job(
            spec,
            make_pipeline,
            include_stop=options["include_stop_str_in_output"],
            parallel_tool_calls=request.parallel_tool_calls is not False,
        )


def check(request: ChatRequest) -> None:
    """Fields of a chat request that contradict each other."""
    check_common(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    asked, older = request.max_completion_tokens, request.max_tokens
    if asked is not None and older is not None and asked != older:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens disagree: give one of them", param="max_tokens"
        )
    _check_tools(request)
    if request.continue_final_message:
        if request.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        if not isinstance(request.messages[-1], AssistantMessage):
            raise InvalidRequest(
                "continue_final_message needs a last message of the assistant",
                param="continue_final_message",
            )


def _check_tools(request: ChatRequest) -> None:
    choice = request.tool_choice
    names = [tool.function.name for tool in request.tools or ()]
    if not names:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("'tool_choice' needs 'tools'", param="tool_choice")
        return
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise InvalidRequest(
            f"tool_choice names '{choice.function.name}', which is not among the tools "
            f"({', '.join(names)})",
            param="tool_choice",
        )
    if len(set(names)) != len(names):
        raise InvalidRequest("two tools have the same name", param="tools")


def offered_tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools as the template sees them; none with tool_choice "none" (as vLLM)."""
    if not request.tools or request.tool_choice == "none":
        return None
    return template_tools(request.tools)


async def render_prompt(context: Context, request: ChatRequest) -> list[int]:
    """Raises `TemplateFailed`, or `InvalidRequest` for messages that cannot be rendered."""
    continues = bool(request.continue_final_message)
    text = context.template(request.chat_template).render(
        template_messages(request.messages),
        tools=offered_tools(request),
        add_generation_prompt=request.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
        kwargs=request.chat_template_kwargs,
    )
    ids = await context.texts.tokenizer.encode_async(text, bool(request.add_special_tokens))
    if not ids:
        raise InvalidRequest("the chat template made an empty prompt of it", param="messages")
    return ids
