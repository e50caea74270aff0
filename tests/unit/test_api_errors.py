"""Bad input: OpenAI's error body with the right status and field, and the server goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from tests.helpers.asgi_call import AsgiCall
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.live_fake import small_texts

from penstock.protocol.errors import EngineUnavailable
from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.text.texts import Texts

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return small_texts(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def generator(texts: Texts) -> FakeGenerator:
    return FakeGenerator(texts.tokenizer)


@pytest.fixture
def app(generator: FakeGenerator, texts: Texts) -> FastAPI:
    return create_app(generator, texts, ApiConfig(("m", "alias"), max_body_bytes=100_000))


async def refused(app: FastAPI, path: str, body: object, **options: Any) -> tuple[int, Any]:
    """Status and error of a POST; afterwards the server still answers."""
    call = await AsgiCall(app, "POST", path, body, **options).finished()
    found = call.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    good = await AsgiCall(app, "POST", CHAT, {"messages": HELLO}).finished()
    assert good.status == 200
    return call.status, found["error"]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def messages(*found: Any) -> dict[str, Any]:
    return {"messages": list(found)}


UNSUPPORTED = [
    (chat(functions=[]), "functions"),
    (chat(audio={}), "audio"),
    (chat(best_of=2), "best_of"),
    (chat(store=True), "store"),
    (chat(chat_template="{{ messages }}"), "chat_template"),
    (chat(stream=True, stream_options={"include_obfuscation": True}),
     "stream_options.include_obfuscation"),
    (chat(tools=[{"type": "function", "function": {"name": "f", "extra": 1}}]),
     "tools[0].function.extra"),
    (messages({"role": "user", "content": "a", "weight": 1}), "messages[0].weight"),
    (messages({"role": "user", "content": [{"type": "text", "text": "a"},
                                           {"type": "image_url", "image_url": {"url": "x"}}]}),
     "messages[0].content[1]"),
]  # fmt: skip

INVALID = [
    ({}, "messages"),
    ([], None),
    ("text", None),
    (None, None),
    (chat(messages=[]), "messages"),
    (chat(messages="Hello"), "messages"),
    (chat(messages=None), "messages"),
    (messages({"role": "alien", "content": "a"}), "messages[0].role"),
    (messages({"content": "a"}), "messages[0].role"),
    (messages({"role": "user"}), "messages[0].content"),
    (messages({"role": "user", "content": None}), "messages[0].content"),
    (messages({"role": "user", "content": 7}), "messages[0].content"),
    (messages({"role": "tool", "content": "a"}), "messages[0].tool_call_id"),
    (messages(*HELLO, {"role": "assistant"}), "messages[1].content"),
    (chat(n=0), "n"),
    (chat(n=129), "n"),
    (chat(n="1"), "n"),
    (chat(n=1.5), "n"),
    (chat(n=True), "n"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_tokens=10**30), "max_tokens"),
    (chat(max_completion_tokens=0), "max_completion_tokens"),
    (chat(max_tokens=1, max_completion_tokens=2), "max_tokens"),
    (chat(top_p=0), "top_p"),
    (chat(top_p=1.01), "top_p"),
    (chat(top_p="0.5"), "top_p"),
    (chat(temperature=-0.1), "temperature"),
    (chat(temperature=2.1), "temperature"),
    (chat(min_p=1.1), "min_p"),
    (chat(top_k=-2), "top_k"),
    (chat(repetition_penalty=0), "repetition_penalty"),
    (chat(presence_penalty=2.1), "presence_penalty"),
    (chat(frequency_penalty=-2.1), "frequency_penalty"),
    (chat(seed=2**63), "seed"),
    (chat(logit_bias={"a": 1}), "logit_bias"),
    (chat(logit_bias={"-1": 1}), "logit_bias"),
    (chat(logit_bias={" 1": 1}), "logit_bias"),
    (chat(logit_bias={"100000": 1}), "logit_bias"),
    (chat(logit_bias={"1": 101}), "logit_bias[...]"),
    (chat(stop=["a"] * 17), "stop"),
    (chat(stop=""), "stop"),
    (chat(stop=["a", ""]), "stop[1]"),
    (chat(stop_token_ids=[100000]), "stop_token_ids"),
    (chat(stop_token_ids=[-1]), "stop_token_ids[0]"),
    (chat(min_tokens=5, max_tokens=4), "min_tokens"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logprobs=3), "logprobs"),
    (chat(prompt_logprobs=1, stream=True), "prompt_logprobs"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(stream="yes"), "stream"),
    (chat(response_format={"type": "xml"}), "response_format.type"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (chat(response_format="json_object"), "response_format"),
    (chat(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs.regex"),
    (chat(guided_regex="a", response_format={"type": "json_object"}), "guided_regex"),
    (chat(guided_json="{"), "guided_json"),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(tools=[TOOL], tool_choice="sometimes"), "tool_choice"),
    (chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
     "tool_choice"),
    (chat(tools=[TOOL, TOOL]), "tools"),
    (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
    (chat(tools=[{"type": "retrieval"}]), "tools[0].type"),
    (chat(service_tier="priority"), "service_tier"),
    (chat(modalities=["text", "audio"]), "modalities[1]"),
    (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs.messages"),
    (chat(continue_final_message=True), "continue_final_message"),
    (messages(*HELLO, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}),
     "messages[1].tool_calls[0].function.arguments"),
]  # fmt: skip

INVALID_COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [1, 350]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [[1], [10**12]]}, "prompt[1][0]"),
    ({"prompt": [[1.5]]}, "prompt[0][0]"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "n": 2, "best_of": 3}, "best_of"),
    ({"prompt": "a", "messages": HELLO}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), UNSUPPORTED)
async def test_what_is_not_supported_is_named(app: FastAPI, body: Any, param: str) -> None:
    status, error = await refused(app, CHAT, body)
    assert (status, error["param"], error["code"]) == (400, param, "unsupported_feature")
    assert param.rsplit(".")[-1] in error["message"] or "image_url" in error["message"]


@pytest.mark.parametrize(("body", "param"), INVALID)
async def test_invalid_chat(app: FastAPI, body: Any, param: str | None) -> None:
    status, error = await refused(app, CHAT, body)
    assert (status, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("body", "param"), INVALID_COMPLETIONS)
async def test_invalid_completions(app: FastAPI, body: Any, param: str) -> None:
    status, error = await refused(app, COMPLETIONS, body)
    assert (status, error["param"]) == (400, param), error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": [}',
        b'{"messages": NaN}',
        b'{"messages": [], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00\\ud800"}]}',
        b'{"metadata": {"a": ' + b"[" * 40_000 + b"]" * 40_000 + b"}}",
        b'{"chat_template_kwargs": {"a": ' + b"[" * 40_000 + b"]" * 40_000 + b"}}",
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
        b"\x00\x01\x02",
    ],
)
async def test_bodies_that_are_no_json(app: FastAPI, body: bytes) -> None:
    status, error = await refused(app, CHAT, body)
    assert status == 400 and error["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": {"type": "nothing"}},
                }
            },
            "response_format",
        ),
        ({"guided_regex": "(unclosed"}, "guided_regex"),
        ({"guided_grammar": "no grammar"}, "guided_grammar"),
        ({"structured_outputs": {"regex": "[a"}}, "structured_outputs"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"$ref": "#/nowhere"}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
async def test_what_does_not_compile(app: FastAPI, fields: Any, param: str) -> None:
    status, error = await refused(app, CHAT, chat(**fields))
    assert (status, error["code"], error["param"]) == (400, "invalid_constraint", param)


async def test_constraints_reach_the_engine(app: FastAPI, generator: FakeGenerator) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    fields = [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": asked}, "json_schema"),
        ({"guided_choice": ["a", "b"]}, "choice"),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex"),
        ({"tools": [TOOL]}, None),
        ({"tools": [TOOL], "tool_choice": "none"}, None),
        ({"tools": [TOOL], "tool_choice": "required"}, "lark"),
        ({"tools": [TOOL], "tool_choice": TOOL | {"function": {"name": "f"}}}, "lark"),
    ]
    for asked_for, kind in fields:
        call = await AsgiCall(app, "POST", CHAT, chat(**asked_for)).finished()
        assert call.status == 200, call.body
        found = generator.specs[-1].constraint
        assert (found and found.kind) == kind
    assert len(generator.specs) == len(fields)


async def test_deep_arguments(app: FastAPI) -> None:
    deep = "[" * 20_000 + "]" * 20_000
    call = {"id": "1", "function": {"name": "f", "arguments": deep}}
    body = messages(*HELLO, {"role": "assistant", "tool_calls": [call]})
    assert (await refused(app, CHAT, body))[0] == 400


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
async def test_an_unknown_model_is_404(app: FastAPI, path: str) -> None:
    body = {
        CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "a"}, "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [7]},
    }[path]  # fmt: skip
    status, error = await refused(app, path, {**body, "model": "other"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    for name in ("m", "alias"):
        good = await AsgiCall(app, "POST", path, {**body, "model": name}).finished()
        assert good.status == 200


async def test_both_lengths_are_in_the_message(app: FastAPI) -> None:
    status, error = await refused(app, COMPLETIONS, {"prompt": [7] * 600})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "600" in error["message"] and "512" in error["message"]
    status, error = await refused(app, COMPLETIONS, {"prompt": [7] * 500, "max_tokens": 13})
    assert status == 400 and error["param"] == "max_tokens"
    assert all(number in error["message"] for number in ("500", "13", "512"))
    fits = await AsgiCall(
        app, "POST", COMPLETIONS, {"prompt": [7] * 500, "max_tokens": 12}
    ).finished()
    assert fits.status == 200
    full = await AsgiCall(app, "POST", COMPLETIONS, {"prompt": [7] * 512}).finished()
    assert full.status == 400


async def test_a_template_that_raises(app: FastAPI) -> None:
    status, error = await refused(app, CHAT, messages({"role": "system", "content": "raise"}))
    assert (status, error["code"]) == (400, "template_failed")
    assert "this template raises" in error["message"]


async def test_a_request_template_where_it_is_trusted(
    generator: FakeGenerator, texts: Texts
) -> None:
    app = create_app(generator, texts, ApiConfig(("m",), trust_request_chat_template=True))
    body = chat(chat_template="<{{ messages[0].content }}>")
    assert (await AsgiCall(app, "POST", CHAT, body).finished()).status == 200
    assert texts.tokenizer.decode(generator.specs[-1].prompt_ids) == "<Hello>"
    status, error = await refused(app, CHAT, chat(chat_template="{% if %}"))
    assert (status, error["code"]) == (400, "template_failed")


async def test_bodies_over_the_limit(app: FastAPI) -> None:
    big = json.dumps({"prompt": "a" * 100_000}).encode()
    status, error = await refused(app, COMPLETIONS, big, headers={"content-length": "100014"})
    assert (status, error["code"]) == (413, "payload_too_large")
    # Chunked: refused as soon as it is too much, not when all of it has come.
    call = AsgiCall(app, "POST", COMPLETIONS, chunks=[b"x" * 30_000] * 100)
    await call.finished()
    assert call.status == 413 and call.num_received == 4


async def test_routes_and_methods(app: FastAPI) -> None:
    missing = await AsgiCall(app, "POST", "/v1/nothing", {}).finished()
    assert missing.status == 404 and missing.json()["error"]["code"] == "not_found"
    wrong = await AsgiCall(app, "GET", CHAT).finished()
    assert wrong.status == 405 and wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


async def test_before_the_engine_is_there(app: FastAPI, generator: FakeGenerator) -> None:
    generator.behaviour.ready = False
    for path in ("/health", "/health/ready"):
        call = await AsgiCall(app, "GET", path).finished()
        assert call.status == 503 and "no engine" in call.json()["reason"]
    assert (await AsgiCall(app, "GET", "/health/live").finished()).status == 200
    assert (await AsgiCall(app, "GET", "/v1/models").finished()).status == 200
    call = await AsgiCall(app, "POST", CHAT, chat()).finished()
    assert call.status == 503 and call.json()["error"]["code"] == "engine_unavailable"
    assert "retry-after" in call.headers
    generator.behaviour.ready = True
    generator.behaviour.refuse = EngineUnavailable("gone", retry_after_s=0.0)
    call = await AsgiCall(app, "POST", CHAT, chat()).finished()
    assert call.status == 503 and call.headers["retry-after"] == "1"


async def test_what_nobody_foresaw_is_500_without_its_insides(
    app: FastAPI, generator: FakeGenerator
) -> None:
    generator.behaviour.script = lambda *_: 1 / 0  # type: ignore[arg-type, return-value]
    call = AsgiCall(app, "POST", CHAT, chat())
    with pytest.raises(ZeroDivisionError):  # raised further for the server's log
        await call.finished()
    assert call.status == 500 and call.json()["error"]["code"] == "internal_error"
    assert "ZeroDivision" not in call.body.decode()


async def test_keys(generator: FakeGenerator, texts: Texts, caplog: Any) -> None:
    config = ApiConfig(("m",), api_keys=("secret-1", "secret-2"))
    assert "secret" not in repr(config)
    app = create_app(generator, texts, config)
    for header in (None, "Bearer", "Bearer ", "Bearer wrong", "secret-1", "Basic secret-1"):
        headers = {"Authorization": header} if header is not None else {}
        call = await AsgiCall(app, "GET", "/v1/models", headers=headers).finished()
        assert call.status == 401 and call.json()["error"]["code"] == "invalid_api_key"
        assert call.headers["www-authenticate"] == "Bearer"
    for key in ("secret-1", "secret-2"):
        headers = {"Authorization": f"bearer {key}"}
        assert (await AsgiCall(app, "GET", "/v1/models", headers=headers).finished()).status == 200
    for path in ("/health", "/health/ready", "/health/live", "/metrics"):
        assert (await AsgiCall(app, "GET", path).finished()).status == 200
    for path in ("/healthy", "/v1/completions", "/tokenize"):
        assert (await AsgiCall(app, "POST", path, {}).finished()).status == 401
    assert "secret" not in caplog.text


async def test_request_ids_go_back(app: FastAPI) -> None:
    for path, body in ((CHAT, chat()), (CHAT, {}), ("/nothing", {})):
        headers = {"X-Request-Id": "req-7"}
        call = await AsgiCall(app, "POST", path, body, headers=headers).finished()
        assert call.headers["x-request-id"] == "req-7"
    for bad in ("", "a b", "é", "x" * 129):
        headers = {"X-Request-Id": bad}
        call = await AsgiCall(app, "POST", CHAT, chat(), headers=headers).finished()
        assert call.status == 200 and "x-request-id" not in call.headers


async def test_requests_are_logged_without_secrets(
    generator: FakeGenerator, texts: Texts, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(
        generator, texts, ApiConfig(("m",), api_keys=("secret-key",), log_requests=True)
    )
    caplog.set_level("INFO", "penstock.requests")
    headers = {"Authorization": "Bearer secret-key", "X-Request-Id": "req-9"}
    await AsgiCall(app, "POST", CHAT, chat(stream=True), headers=headers).finished()
    await AsgiCall(app, "GET", "/a\nb").finished()
    await AsgiCall(app, "GET", "/health").finished()
    first, second = [record.getMessage() for record in caplog.records if "requests" in record.name]
    assert first.startswith(f"POST {CHAT} 200 ") and first.endswith(" s [req-9]")
    assert second.startswith("GET /a\\nb 401 ")
    assert "secret" not in caplog.text


def test_settings_are_checked(tmp_path: Path) -> None:
    for bad in ({"served_model_names": ()}, {"api_keys": ("a", "")}, {"max_body_bytes": 0}):
        with pytest.raises(ValueError, match=r"model name|key|max_body_bytes"):
            ApiConfig(**{"served_model_names": ("m",), **bad})  # type: ignore[arg-type]
