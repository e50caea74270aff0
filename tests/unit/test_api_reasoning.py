"""reasoning_content apart from content, whole and streamed; `n` and the tags of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.asgi_call import AsgiCall
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.small_checkpoint import make_checkpoint

from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.text.texts import Texts

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


async def test_reasoning(tmp_path: Path) -> None:
    texts = Texts.from_checkpoint(make_checkpoint(tmp_path / "m"), reasoning_parser="qwen3")
    generator = FakeGenerator(texts.tokenizer)
    generator.behaviour.script = lambda _, k: f"<think>\nhm {k}</think>\n\nyes"
    app = create_app(generator, texts, ApiConfig(("m",)))
    whole = await AsgiCall(app, "POST", CHAT, {"messages": HELLO, "n": 2}).finished()
    messages = [choice["message"] for choice in whole.json()["choices"]]
    assert [m["reasoning_content"] for m in messages] == ["hm 0", "hm 1"]
    assert [m["content"] for m in messages] == ["yes", "yes"]
    body = {"messages": HELLO, "stream": True}
    streamed = await AsgiCall(app, "POST", CHAT, body).finished()
    deltas = [json.loads(e)["choices"][0]["delta"] for e in streamed.events[:-1]]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm 0"
    assert "".join(d.get("content") or "" for d in deltas) == "yes"
    # Sent back in the next turn, it reaches the template.
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    again = await AsgiCall(app, "POST", CHAT, {"messages": [*HELLO, turn, *HELLO]}).finished()
    assert again.status == 200


async def test_tools_without_a_parser_are_refused(tmp_path: Path) -> None:
    texts = Texts.from_checkpoint(make_checkpoint(tmp_path / "m"), tool_call_parser="none")
    app = create_app(FakeGenerator(texts.tokenizer), texts, ApiConfig(("m",)))
    tool = {"type": "function", "function": {"name": "f"}}
    call = await AsgiCall(app, "POST", CHAT, {"messages": HELLO, "tools": [tool]}).finished()
    assert call.status == 400 and call.json()["error"]["param"] == "tools"
    body = {"messages": HELLO, "tools": [tool], "tool_choice": "none"}
    assert (await AsgiCall(app, "POST", CHAT, body).finished()).status == 200
