"""Streams at the level of ASGI: disconnects, slow readers, errors, batching, exact gauges."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from tests.helpers.asgi_call import AsgiCall
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.live_fake import small_texts

from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.metrics import Metrics
from penstock.service.text.texts import Texts

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return small_texts(
        tmp_path_factory.mktemp("model") / "m", temperature=0.6, top_k=20, top_p=None
    )


@pytest.fixture
def generator(texts: Texts) -> FakeGenerator:
    return FakeGenerator(texts.tokenizer, max_model_len=8192)


@pytest.fixture
def app(generator: FakeGenerator, texts: Texts) -> FastAPI:
    return create_app(generator, texts, ApiConfig(("m",)))


@pytest.fixture
def metrics(app: FastAPI) -> Metrics:
    found = app.state.context.metrics
    assert isinstance(found, Metrics)
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def all_quiet(metrics: Metrics, generator: FakeGenerator) -> bool:
    return (metrics.waiting, metrics.running, generator.num_live) == (0, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_disconnect_while_waiting(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics, stream: bool, n: int
) -> None:
    generator.behaviour.gate = asyncio.Event()
    call = AsgiCall(app, "POST", COMPLETIONS, {"prompt": "a", "n": n, "stream": stream})
    await until(lambda: metrics.waiting == n)
    call.disconnect()
    await call.finished()
    assert generator.streams[0].cancelled == [None]
    assert all_quiet(metrics, generator)
    assert metrics.finished == {"abort": n}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_in_the_middle(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics, stream: bool
) -> None:
    generator.behaviour.script = lambda *_: "Hello " * 1000
    body = {"prompt": ["a", "b"], "n": 2, "stream": stream}
    call = AsgiCall(app, "POST", COMPLETIONS, body)
    await until(lambda: metrics.running == 4)
    call.disconnect()
    await call.finished()
    assert [s.cancelled for s in generator.streams] == [[None], [None]]
    assert all_quiet(metrics, generator)
    assert metrics.finished == {"abort": 4}
    await until(lambda: len(asyncio.all_tasks()) == 1)  # no pump, no watcher stays behind


async def test_a_cancelled_task_frees_its_request(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics
) -> None:
    """What a server does on shutdown."""
    generator.behaviour.script = lambda *_: "Hello " * 1000
    call = AsgiCall(app, "POST", COMPLETIONS, {"prompt": "a", "stream": True})
    await until(lambda: metrics.running == 1)
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert all_quiet(metrics, generator)


async def test_a_slow_reader_waits_alone(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics
) -> None:
    generator.behaviour.script = lambda *_: "Hello " * 200
    slow = AsgiCall(app, "POST", COMPLETIONS, {"prompt": "a", "stream": True})
    await until(lambda: len(slow.sent) > 3)
    slow.reads.clear()
    others = [AsgiCall(app, "POST", COMPLETIONS, {"prompt": "b", "stream": True}) for _ in "12"]
    for other in others:
        assert (await other.finished()).events[-1] == "[DONE]"
    sent = len(slow.sent)
    assert metrics.running == 1
    await asyncio.sleep(0.01)
    assert len(slow.sent) == sent, "sent to a reader that does not read"
    slow.reads.set()
    await slow.finished()
    text = "".join(json.loads(event)["choices"][0]["text"] for event in slow.events[:-1])
    assert text == "Hello " * 200
    assert all_quiet(metrics, generator)


async def test_a_slow_reader_that_goes_away(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics
) -> None:
    generator.behaviour.script = lambda *_: "Hello " * 200
    slow = AsgiCall(app, "POST", COMPLETIONS, {"prompt": "a", "stream": True})
    await until(lambda: len(slow.sent) > 3)
    slow.reads.clear()
    slow.disconnect()
    await until(lambda: all_quiet(metrics, generator))  # though `send` still waits
    slow.reads.set()
    await slow.finished()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_error_in_the_middle_ends_the_stream(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics, path: str
) -> None:
    generator.behaviour.fail_after = 3
    body = {"stream": True, "n": 2, **({"messages": HELLO} if path == CHAT else {"prompt": "a"})}
    call = await AsgiCall(app, "POST", path, body).finished()
    assert call.status == 200
    assert json.loads(call.events[-2])["error"]["code"] == "engine_failed"
    assert call.events[-1] == "[DONE]" and not call.sent[-1]["more_body"]
    assert all_quiet(metrics, generator)
    assert metrics.finished == {"error": 2}


async def test_an_internal_error_in_the_middle_too(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator.behaviour.script = lambda *_: "Hello " * 1000
    call = AsgiCall(app, "POST", COMPLETIONS, {"prompt": "a", "stream": True})
    await until(lambda: len(call.sent) > 2)
    monkeypatch.setattr(generator.streams[0], "_step", lambda choice: 1 / 0)
    await call.finished()
    assert json.loads(call.events[-2])["error"]["code"] == "internal_error"
    assert call.events[-1] == "[DONE]"
    assert all_quiet(metrics, generator)


async def test_a_stream_that_just_ends_is_an_error(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator.behaviour.gate = asyncio.Event()
    call = AsgiCall(app, "POST", COMPLETIONS, {"prompt": "a"})
    await until(lambda: bool(generator.streams))
    generator.streams[0].cancel()  # not by the API
    await call.finished()
    assert call.status == 500 and call.json()["error"]["code"] == "engine_failed"
    assert all_quiet(metrics, generator)


async def test_one_refused_prompt_refuses_all(
    app: FastAPI, generator: FakeGenerator, metrics: Metrics
) -> None:
    generator.behaviour.max_queue = 2
    call = await AsgiCall(app, "POST", COMPLETIONS, {"prompt": ["a", "b", "c"]}).finished()
    assert call.status == 429 and call.headers["retry-after"] == "3"
    assert [s.cancelled for s in generator.streams] == [[None], [None]]
    assert all_quiet(metrics, generator)
    assert metrics.refused == {"overloaded": 1}


async def test_what_has_gathered_leaves_in_one_message(
    app: FastAPI, generator: FakeGenerator
) -> None:
    """One `send` for each wake-up, whatever the number of choices; one chunk for each choice."""
    generator.behaviour.tokens_a_delta = 100
    call = await AsgiCall(
        app, "POST", COMPLETIONS, {"prompt": "a", "n": 8, "stream": True}
    ).finished()
    assert len(call.sent) == 2
    assert len(call.events) == 9
    assert {json.loads(e)["choices"][0]["text"] for e in call.events[:-1]} == {"Hello, world."}


async def test_the_chunks_of_a_chat(app: FastAPI, generator: FakeGenerator) -> None:
    generator.behaviour.script = lambda *_: "Hi"
    call = await AsgiCall(app, "POST", CHAT, {"messages": HELLO, "stream": True}).finished()
    assert call.headers["content-type"].startswith("text/event-stream")
    *chunks, done = call.events
    assert done == "[DONE]"
    found = [json.loads(chunk) for chunk in chunks]
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in found}) == 1
    deltas = [c["choices"][0]["delta"] for c in found]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(d.get("content", "") for d in deltas) == "Hi"
    assert deltas[-1] == {}
    assert [c["choices"][0]["finish_reason"] for c in found][-2:] == [None, "stop"]
    assert not any("usage" in c for c in found)


async def test_an_answer_of_nothing(app: FastAPI, generator: FakeGenerator) -> None:
    generator.behaviour.script = lambda *_: ""
    whole = await AsgiCall(app, "POST", CHAT, {"messages": HELLO}).finished()
    assert whole.json()["choices"][0]["message"]["content"] == ""
    assert whole.json()["usage"]["completion_tokens"] == 1
    call = await AsgiCall(app, "POST", CHAT, {"messages": HELLO, "stream": True}).finished()
    assert len(call.events) == 3


async def test_defaults_of_the_checkpoint(generator: FakeGenerator, texts: Texts) -> None:
    config: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True}
    app = create_app(generator, texts, ApiConfig(("m",), generation_config=config))
    await AsgiCall(app, "POST", CHAT, {"messages": HELLO}).finished()
    await AsgiCall(app, "POST", CHAT, {"messages": HELLO, "temperature": 1, "top_k": -1}).finished()
    first, second = (spec.sampling for spec in generator.specs)
    assert (first.temperature, first.top_k, first.top_p) == (0.6, 20, 1.0)
    assert (second.temperature, second.top_k) == (1.0, 0)


async def test_a_server_seed_makes_seeds_repeatable(generator: FakeGenerator, texts: Texts) -> None:
    for _ in range(2):
        app = create_app(generator, texts, ApiConfig(("m",), seed=3))
        await AsgiCall(app, "POST", CHAT, {"messages": HELLO}).finished()
    first, second = (spec.sampling.seed for spec in generator.specs)
    assert first == second


async def test_a_long_prompt_is_tokenized_elsewhere(app: FastAPI, generator: FakeGenerator) -> None:
    generator.behaviour.script = lambda *_: "x"
    call = await AsgiCall(app, "POST", COMPLETIONS, {"prompt": "dog. " * 2000}).finished()
    assert call.status == 200 and len(generator.specs[0].prompt_ids) > 2000
