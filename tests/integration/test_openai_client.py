"""The openai client, synchronous and asynchronous, against a live server.

The checks of `tests.helpers.openai_checks` hold for any engine. Here they run over a fake engine,
and what a script makes certain is tested to the letter.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from penstock.protocol.errors import Overloaded
from penstock.service.generation import GenerationSpec
from penstock.service.text.texts import Texts
from tests.helpers import openai_checks
from tests.helpers.live_fake import MODEL, LiveFake, live_fake, small_texts
from tests.helpers.openai_checks import HELLO, TOOL, client_for, streamed_call
from tests.helpers.server import running

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return small_texts(tmp_path_factory.mktemp("model") / MODEL)


@pytest.fixture(scope="module")
def server(texts: Texts) -> Iterator[LiveFake]:
    with live_fake(texts) as found:
        yield found


@pytest.fixture
def fake(server: LiveFake) -> Iterator[LiveFake]:
    """The server with a fake that behaves; whatever a test changed is undone."""
    server.generator.behaviour = type(server.generator.behaviour)()
    server.generator.specs.clear()
    yield server
    server.generator.behaviour = type(server.generator.behaviour)()
    wait_until(lambda: server.generator.num_live == 0)
    assert (server.context.metrics.waiting, server.context.metrics.running) == (0, 0)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def engine_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`penstock serve` with a real engine and random weights: the same checks hold for it."""
    from tests.helpers.checkpoints import make_checkpoint

    folder = make_checkpoint(tmp_path_factory.mktemp("engine") / "m", "qwen3")
    flags = ("--dtype", "float32", "--served-model-name", MODEL, "--max-model-len", "512")
    with running(str(folder), *flags) as found:
        yield found.url


@pytest.mark.parametrize(
    "check",
    [*openai_checks.CHECKS, *openai_checks.ENGINE_CHECKS],
    ids=lambda check: check.__name__,
)
def test_a_real_engine(engine_url: str, check: Callable[[str, str], None]) -> None:
    check(engine_url, MODEL)


async def test_async_streams_of_a_real_engine(engine_url: str) -> None:
    await openai_checks.check_async_streams(engine_url, MODEL)


@pytest.mark.parametrize("check", openai_checks.CHECKS, ids=lambda check: check.__name__)
def test_any_server(fake: LiveFake, check: Callable[[str, str], None]) -> None:
    check(fake.url, MODEL)


async def test_async_streams(fake: LiveFake) -> None:
    fake.generator.behaviour.script = lambda spec, _: f"Seed {spec.sampling.seed}."
    await openai_checks.check_async_streams(fake.url, MODEL)


def test_forced_tools(fake: LiveFake) -> None:
    fake.generator.behaviour.script = lambda spec, _: CALL
    openai_checks.check_forced_tool(fake.url, MODEL)


def test_text_is_what_the_engine_said(fake: LiveFake) -> None:
    said = 'Grüße "quoted" \\ \n\t 😀 \u2028 日本語 \x7f'
    fake.generator.behaviour.script = lambda *_: said
    client = client_for(fake.url)
    whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert whole.choices[0].message.content == said
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == said


@pytest.mark.parametrize("tokens_a_delta", [1, 3, 100])
def test_auto_tool_call_after_content(fake: LiveFake, tokens_a_delta: int) -> None:
    fake.generator.behaviour.script = lambda *_: "Let me see. " + CALL
    fake.generator.behaviour.tokens_a_delta = tokens_a_delta
    client = client_for(fake.url)
    found = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL])
    message = found.choices[0].message
    assert message.content == "Let me see."
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    assert found.choices[0].finish_reason == "tool_calls"
    name, arguments, finish = streamed_call(client, MODEL, "auto", {})
    assert (name, json.loads(arguments), finish) == ("get_weather", {"city": "Oslo"}, "tool_calls")


def test_a_call_alone_has_null_content(fake: LiveFake) -> None:
    fake.generator.behaviour.script = lambda *_: CALL
    client = client_for(fake.url)
    found = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL])
    assert found.choices[0].message.content is None
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL], stream=True)
    first = next(iter(stream))
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content is None
    stream.close()


def test_parallel_calls(fake: LiveFake) -> None:
    fake.generator.behaviour.script = lambda *_: f"{CALL}\n{CALL}"
    client = client_for(fake.url)
    both = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL])
    calls = both.choices[0].message.tool_calls or []
    assert len(calls) == 2 and calls[0].id != calls[1].id
    one = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[TOOL], parallel_tool_calls=False
    )
    assert len(one.choices[0].message.tool_calls or []) == 1
    assert one.choices[0].finish_reason == "tool_calls"


def test_without_tools_a_call_is_text(fake: LiveFake) -> None:
    fake.generator.behaviour.script = lambda *_: "a <tool_call> b"
    for options in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        found = client_for(fake.url).chat.completions.create(
            model=MODEL, messages=HELLO, extra_body={"skip_special_tokens": False}, **options
        )
        assert found.choices[0].message.content == "a <tool_call> b"
        assert found.choices[0].message.tool_calls is None


def test_a_whole_conversation_goes_into_the_prompt(fake: LiveFake) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Very."}]},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    client_for(fake.url).chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])  # type: ignore[arg-type]
    (spec,) = fake.generator.specs
    text = fake.texts.tokenizer.decode(spec.prompt_ids, skip_special_tokens=False)
    for part in ("Be brief.", "Very.", "Weather?", '{"city": "Oslo"}', "rain", "Tools:"):
        assert part in text
    assert text.endswith("<|im_start|>assistant\n")
    assert "<|im_start|>developer" not in text


def test_continuing_the_final_message(fake: LiveFake) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The sky is"}]
    client_for(fake.url).chat.completions.create(
        model=MODEL,
        messages=messages,
        extra_body={"continue_final_message": True},  # type: ignore[arg-type]
    )
    (spec,) = fake.generator.specs
    assert fake.texts.tokenizer.decode(spec.prompt_ids, False).endswith("assistant\nThe sky is")


def test_every_sampling_field_reaches_the_engine(fake: LiveFake) -> None:
    client_for(fake.url).chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0.5, top_p=0.9, presence_penalty=0.1,
        frequency_penalty=-0.2, logit_bias={"7": 1.5}, seed=-3, max_tokens=9, n=2,
        logprobs=True, top_logprobs=5, user="u", metadata={"a": "b"}, store=False,
        service_tier="auto",
        extra_body={
            "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 2,
            "ignore_eos": True, "stop_token_ids": [9], "prompt_logprobs": 1, "priority": 4,
            "cache_salt": "s",
        },
    )  # fmt: skip
    (spec,) = fake.generator.specs
    sampling = spec.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert sampling.logit_bias == {7: 1.5}
    assert sampling.seed == 2**63 - 3
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (9, 2, True)
    assert (sampling.stop_token_ids, sampling.logprobs, sampling.prompt_logprobs) == ((9,), 5, 1)
    assert (spec.n, spec.priority, spec.cache_salt) == (2, 4, "s")


def test_without_max_tokens_the_rest_of_the_context(fake: LiveFake) -> None:
    client_for(fake.url).chat.completions.create(model=MODEL, messages=HELLO)
    (spec,) = fake.generator.specs
    card = fake.generator.card
    assert card is not None
    assert spec.sampling.max_tokens == card.max_model_len - len(spec.prompt_ids)


def test_seeds_differ_unless_given(fake: LiveFake) -> None:
    client = client_for(fake.url)
    for seed in (None, None, 5):
        client.completions.create(model=MODEL, prompt="a", seed=seed)
    seeds = [spec.sampling.seed for spec in fake.generator.specs]
    assert seeds[0] != seeds[1] and seeds[2] == 5


def test_cached_tokens_are_reported(fake: LiveFake) -> None:
    fake.generator.behaviour.cached_tokens = 4
    found = client_for(fake.url).completions.create(model=MODEL, prompt=["aaaa", "bbbbb"])
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 8


def test_usage_on_every_chunk(fake: LiveFake) -> None:
    stream = client_for(fake.url).chat.completions.create(
        model=MODEL, messages=HELLO, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts == sorted(counts) and counts[-1] > 3


def test_stop_token_ids_are_named(fake: LiveFake) -> None:
    comma = fake.texts.tokenizer.encode(",", False)[0]
    found = client_for(fake.url).chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"stop_token_ids": [comma]}
    )
    assert found.choices[0].message.content == "Hello"
    assert found.choices[0].model_extra == {"stop_reason": comma}
    kept = client_for(fake.url).chat.completions.create(
        model=MODEL, messages=HELLO,
        extra_body={"stop_token_ids": [comma], "include_stop_str_in_output": True},
    )  # fmt: skip
    assert kept.choices[0].message.content == "Hello,"


def test_stop_strings_across_tokens(fake: LiveFake) -> None:
    fake.generator.behaviour.script = lambda *_: "one two three four"
    client = client_for(fake.url)
    for stream in (False, True):
        found = client.completions.create(
            model=MODEL, prompt="a", stop=["o th", "four"], stream=stream
        )
        if stream:
            chunks = list(found)  # type: ignore[arg-type]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            last = chunks[-1].choices[0]
        else:
            text, last = found.choices[0].text, found.choices[0]  # type: ignore[union-attr]
        assert text == "one tw"
        assert last.finish_reason == "stop" and last.model_extra == {"stop_reason": "o th"}
    wait_until(lambda: fake.generator.num_live == 0)


def test_prompt_logprobs(fake: LiveFake) -> None:
    found = client_for(fake.url).completions.create(
        model=MODEL, prompt=[10, 11, 12], max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    extra = found.choices[0].model_extra
    assert extra is not None
    first, *rest = extra["prompt_logprobs"]
    assert first is None and [set(entry) for entry in rest] == [{"11", "1"}, {"12", "1"}]
    assert rest[0]["11"] == {"logprob": -0.5, "rank": 1, "decoded_token": "'"}


def test_a_full_queue_is_429_with_retry_after(fake: LiveFake) -> None:
    fake.generator.behaviour.refuse = Overloaded("full", retry_after_s=1.2)
    with pytest.raises(openai.RateLimitError) as caught:
        client_for(fake.url).chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.code == "overloaded"


def test_an_error_before_the_first_token_has_its_status(fake: LiveFake) -> None:
    fake.generator.behaviour.fail_after = 0
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            client_for(fake.url).chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
        assert caught.value.code == "engine_failed"


def test_an_error_after_it_is_an_event_and_done(fake: LiveFake) -> None:
    fake.generator.behaviour.fail_after = 2
    with pytest.raises(openai.APIError, match="a step raised"):
        list(client_for(fake.url).chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    body = {"messages": HELLO, "stream": True}
    raw = httpx.post(f"{fake.url}/v1/chat/completions", json=body).text.split("\n\n")
    assert json.loads(raw[-3].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert raw[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", ["a", ["a", "b", "c"]])
def test_a_disconnect_cancels(fake: LiveFake, stream: bool, prompts: str | list[str]) -> None:
    fake.generator.behaviour.pause_s = 0.01
    fake.generator.behaviour.script = lambda *_: "Hello " * 400
    body = {"prompt": prompts, "stream": stream, "n": 2}
    with (
        httpx.Client(timeout=0.2) as client,
        contextlib.nullcontext() if stream else pytest.raises(httpx.ReadTimeout),
        client.stream("POST", f"{fake.url}/v1/completions", json=body) as response,
    ):
        next(response.iter_lines())
    wait_until(lambda: fake.generator.num_live == 0)
    assert all(s.cancelled[-1:] == [None] for s in fake.generator.streams[-len(prompts) :])
    aborted = fake.context.metrics.finished["abort"]
    assert aborted >= 2 * len(prompts)


def test_a_disconnect_before_the_first_token(fake: LiveFake) -> None:
    fake.generator.behaviour.pause_s = 30.0
    fake.generator.behaviour.script = never_shown
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{fake.url}/v1/completions", json={"prompt": "a", "stream": True}, timeout=0.2)
    wait_until(lambda: fake.generator.num_live == 0)


def never_shown(spec: GenerationSpec, choice: int) -> str:
    """Special tokens alone: nothing that a chunk could be made of."""
    return "<|im_start|>" * 50
