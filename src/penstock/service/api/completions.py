"""/v1/completions: one or many prompts, as text or as token ids."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.protocol.request import Constraint
from penstock.service.api.body import decode, read_body
from penstock.service.api.completion_render import CompletionRenderer
from penstock.service.api.context import Context, sequence_id
from penstock.service.api.requests_completion import MAX_SEQUENCES, CompletionRequest
from penstock.service.api.run import Job, Run
from penstock.service.api.sampling import check_common, check_ids, make_sampling, text_options
from penstock.service.api.sse import respond
from penstock.service.generation import GenerationSpec
from penstock.service.text.pipeline import OutputPipeline


class Prompt(NamedTuple):
    """`text` is what an echo shows."""

    text: str
    ids: list[int]


_decoder = msgspec.json.Decoder(CompletionRequest)


class CompletionEndpoint:
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
        constraint = await context.constraints.of(request)
        prompts = await self._prompts(request, card.vocab_size)
        envelope = context.envelope("cmpl", model, card)
        jobs = [
            self._job(request, prompt, constraint, sequence_id(envelope, number))
            for number, prompt in enumerate(prompts)
        ]
        renderer = CompletionRenderer(
            envelope,
            request,
            context.texts.tokenizer,
            [prompt.text for prompt in prompts],
        )
        run = Run(jobs, context.generator, context.metrics, trace)
        renderer.attach(run)
        return await respond(http, run, renderer, bool(request.stream))

    async def _prompts(self, request: CompletionRequest, vocab_size: int) -> list[Prompt]:
        tokenizer = self._context.texts.tokenizer
        prompts = split_prompts(request.prompt)
        if len(prompts) * (request.n or 1) > MAX_SEQUENCES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n = {request.n or 1} are too many for one request: "
                f"the limit is {MAX_SEQUENCES} answers",
                param="prompt",
            )
        out = []
        for given in prompts:
            if isinstance(given, str):
                ids = await tokenizer.encode_async(given, request.add_special_tokens is not False)
                text = given
            else:
                ids = given
                check_ids(ids, vocab_size, "prompt")
                # Only an echo shows it.
                text = tokenizer.decode(ids) if request.echo else ""
            if not ids:
                raise InvalidRequest("the prompt is empty: it has no tokens", param="prompt")
            out.append(Prompt(text, ids))
        return out

    def _job(
        self,
        request: CompletionRequest,
        prompt: Prompt,
        constraint: Constraint | None,
        request_id: str,
    ) -> Job:
        context = self._context
        prompt_only = request.max_tokens == 0
        asked = request.prompt_logprobs
        if asked is None and request.echo:
            asked = request.logprobs
        sampling = make_sampling(
            request,
            card=context.card(),
            defaults=context.sampling_defaults,
            max_tokens=1 if prompt_only else request.max_tokens,
            max_tokens_param="max_tokens",
            prompt_tokens=len(prompt.ids),
            prompt_param="prompt",
            logprobs=request.logprobs,
            prompt_logprobs=asked,
            seed=context.seeds.next(),
        )
        spec = GenerationSpec(
            request_id=request_id,
            prompt_ids=prompt.ids,
            sampling=sampling,
            n=request.n or 1,
            constraint=constraint,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )
        options = text_options(request)

        def make_pipeline(_choice: int) -> OutputPipeline:
            return context.texts.pipeline(prompt.ids, **options)

        return Job(
            spec,
            make_pipeline,
            include_stop=options["include_stop_str_in_output"],
            prompt_only=prompt_only,
        )


def check(request: CompletionRequest) -> None:
    """Fields that contradict each other, or that are not supported."""
    check_common(request)
    if request.suffix:
        raise UnsupportedFeature(
            "'suffix' is not supported: no model here fills in the middle", param="suffix"
        )
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise UnsupportedFeature(
            "'best_of' is not supported beyond 'n': choices are not ranked", param="best_of"
        )
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest(
            "max_tokens must be at least 1 (0 is for 'echo': true alone)", param="max_tokens"
        )


def split_prompts(prompt: str | list[int | str | list[int]]) -> list[str | list[int]]:
    """Text, ids, a list of texts or a list of lists of ids; told apart by their elements."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    if ids or len({type(item) for item in prompt}) != 1:
        raise InvalidRequest(
            "a list of prompts holds texts, or lists of token ids, or token ids: not a mixture",
            param="prompt",
        )
    return [item for item in prompt if not isinstance(item, int)]
