"""What any server with our API does, seen through the openai client.

Each check takes a base URL and a model's name and assumes nothing about what the model says, so
that the same checks run against a fake and against real engines.
"""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
HELLO = [{"role": "user", "content": "Hello"}]
#: Small enough for any test model's context, long enough to have something to compare.
GREEDY = {"temperature": 0.0, "max_tokens": 24, "seed": 7}


def client_for(base_url: str, **options: object) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
    return openai.OpenAI(base_url=f"{base_url}/v1", **options)  # type: ignore[arg-type]


def async_client_for(base_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60.0
    )


def check_models(base_url: str, model: str) -> None:
    client = client_for(base_url)
    assert model in [found.id for found in client.models.list()]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def check_chat_stream_equals_whole(base_url: str, model: str) -> None:
    client = client_for(base_url)
    whole = client.chat.completions.create(model=model, messages=HELLO, **GREEDY)
    text, finish, usage = "", None, None
    stream = client.chat.completions.create(
        model=model, messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    for number, chunk in enumerate(stream):
        assert chunk.object == "chat.completion.chunk"
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert usage is None, "the usage comes last"
        (choice,) = chunk.choices
        assert (choice.delta.role == "assistant") == (number == 0)
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
    (choice,) = whole.choices
    assert text == choice.message.content
    assert finish == choice.finish_reason
    assert finish in ("stop", "length")
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert 0 < whole.usage.completion_tokens <= 24
    assert whole.id.startswith("chatcmpl-")
    assert whole.model == model


def check_chat_logprobs(base_url: str, model: str) -> None:
    found = client_for(base_url).chat.completions.create(
        model=model, messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY
    )
    (choice,) = found.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    raw = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert raw.decode("utf-8", "replace") == choice.message.content
    for entry in choice.logprobs.content:
        assert entry.logprob <= 0.0
        assert len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert values[0] >= entry.logprob


def check_choices(base_url: str, model: str) -> None:
    found = client_for(base_url).chat.completions.create(
        model=model, messages=HELLO, n=3, max_tokens=8, seed=11, temperature=1.0
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    again = client_for(base_url).chat.completions.create(
        model=model, messages=HELLO, n=3, max_tokens=8, seed=11, temperature=1.0
    )
    assert [c.message.content for c in found.choices] == [c.message.content for c in again.choices]


def check_stop(base_url: str, model: str) -> None:
    client = client_for(base_url)
    free = client.chat.completions.create(model=model, messages=HELLO, **GREEDY)
    text = free.choices[0].message.content or ""
    assert len(text) > 2
    stop = text[len(text) // 2]
    found = client.chat.completions.create(model=model, messages=HELLO, stop=[stop], **GREEDY)
    assert found.choices[0].message.content == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def check_length(base_url: str, model: str) -> None:
    found = client_for(base_url).chat.completions.create(
        model=model, messages=HELLO, max_completion_tokens=3, temperature=0.0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None and found.usage.completion_tokens == 3


def check_completions(base_url: str, model: str) -> None:
    client = client_for(base_url)
    one = client.completions.create(model=model, prompt="The quick", **GREEDY)
    assert one.id.startswith("cmpl-")
    streamed = client.completions.create(model=model, prompt="The quick", stream=True, **GREEDY)
    assert "".join(c.choices[0].text for c in streamed if c.choices) == one.choices[0].text
    echoed = client.completions.create(model=model, prompt="The quick", echo=True, **GREEDY)
    assert echoed.choices[0].text == "The quick" + one.choices[0].text
    many = client.completions.create(model=model, prompt=["The quick", "Hello"], n=2, **GREEDY)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == one.choices[0].text


def check_completion_prompts(base_url: str, model: str) -> None:
    """Text, token ids, and lists of either, mean the same."""
    client = client_for(base_url)
    ids = client.post(
        f"{base_url}/tokenize", body={"model": model, "prompt": "Hello"}, cast_to=object
    )
    assert isinstance(ids, dict)
    tokens = ids["tokens"]
    texts = [
        client.completions.create(model=model, prompt=prompt, **GREEDY).choices[0].text  # type: ignore[arg-type]
        for prompt in ("Hello", ["Hello"], tokens, [tokens])
    ]
    assert len(set(texts)) == 1


def check_echo_logprobs(base_url: str, model: str) -> None:
    """echo with max_tokens 0 scores a prompt."""
    found = client_for(base_url).completions.create(
        model=model, prompt="Hello, world", echo=True, logprobs=1, max_tokens=0
    )
    (choice,) = found.choices
    assert choice.text == "Hello, world"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens).endswith("Hello, world")
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0.0 for value in choice.logprobs.token_logprobs[1:])
    assert found.usage is not None and found.usage.completion_tokens == 0


def check_json_schema(base_url: str, model: str) -> None:
    """Whatever the model would say: the answer is of the schema."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    found = client_for(base_url).chat.completions.create(
        model=model, messages=HELLO, temperature=0.0, max_tokens=64,
        response_format={
            "type": "json_schema", "json_schema": {"name": "ok", "schema": schema},
        },
    )  # fmt: skip
    assert set(json.loads(found.choices[0].message.content or "")) == {"ok"}


def check_forced_tool(base_url: str, model: str) -> None:
    client = client_for(base_url)
    choice = {"type": "function", "function": {"name": "get_weather"}}
    settings = {"temperature": 0.0, "max_tokens": 96}
    for tool_choice, finish in (("required", "tool_calls"), (choice, "stop")):
        found = client.chat.completions.create(
            model=model,
            messages=HELLO,
            tools=[TOOL],
            tool_choice=tool_choice,
            **settings,  # type: ignore[call-overload]
        )
        message = found.choices[0].message
        assert message.tool_calls, message
        call = message.tool_calls[0]
        assert call.function.name == "get_weather"
        assert set(json.loads(call.function.arguments)) == {"city"}
        assert found.choices[0].finish_reason == finish
        streamed = streamed_call(client, model, tool_choice, settings)
        assert streamed == (call.function.name, call.function.arguments, finish)


def streamed_call(
    client: openai.OpenAI, model: str, tool_choice: object, settings: dict[str, float]
) -> tuple[str, str, str | None]:
    """Name, arguments and finish reason of the first call, put together from its deltas."""
    name, arguments, finish = "", "", None
    stream = client.chat.completions.create(
        model=model,
        messages=HELLO,
        tools=[TOOL],
        tool_choice=tool_choice,
        stream=True,
        **settings,  # type: ignore[call-overload]
    )
    for chunk in stream:
        (choice,) = chunk.choices
        finish = choice.finish_reason or finish
        for delta in choice.delta.tool_calls or []:
            if delta.index:
                continue
            if delta.id is not None:
                assert delta.type == "function" and delta.function.arguments == ""
                name = delta.function.name
            else:
                assert delta.function.name is None, "the name comes once"
                arguments += delta.function.arguments
    return name, arguments, finish


def check_errors(base_url: str, model: str) -> None:
    client = client_for(base_url)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=HELLO, extra_body={"foo": 1})
    assert refused.value.code == "unsupported_feature" and refused.value.param == "foo"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=model, messages=HELLO, max_tokens=2**30)
    assert long.value.code == "context_length_exceeded"
    # ... and the server goes on.
    check_models(base_url, model)


async def check_async_streams(base_url: str, model: str) -> None:
    """Several at once, each the same as alone."""
    import asyncio

    async def one(number: int) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=HELLO, stream=True, temperature=1.0, max_tokens=12, seed=number
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async with async_client_for(base_url) as client:
        together = await asyncio.gather(*(one(number) for number in range(4)))
        alone = [await one(number) for number in range(4)]
    assert together == alone


def check_disconnect(base_url: str, model: str) -> None:
    """Who closes the stream frees the engine: nothing runs on, and an abort is counted."""
    before = _metric(base_url, "request_success_total", 'finished_reason="abort"')
    stream = client_for(base_url).completions.create(
        model=model, prompt="Hello", stream=True, max_tokens=400, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline_s = time.monotonic() + 10.0
    while (
        _metric(base_url, "request_success_total", 'finished_reason="abort"') == before
        or _metric(base_url, "num_requests_running")
        or _metric(base_url, "instance_requests_running")
    ):
        assert time.monotonic() < deadline_s, "it runs on without a reader"
        time.sleep(0.05)


def _metric(base_url: str, name: str, label: str = "") -> float:
    lines = httpx.get(f"{base_url}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(f"penstock:{name}{{") and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


CHECKS = [
    check_models,
    check_chat_stream_equals_whole,
    check_chat_logprobs,
    check_choices,
    check_stop,
    check_length,
    check_completions,
    check_completion_prompts,
    check_echo_logprobs,
    check_errors,
]
#: These need an engine that obeys constraints, and takes its time.
ENGINE_CHECKS = [check_json_schema, check_forced_tool, check_disconnect]
