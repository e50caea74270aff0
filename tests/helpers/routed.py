"""Requests of a router's clients, and what of the answers and of its books tests look at."""

from __future__ import annotations

from typing import Any

from tests.helpers import raw_http
from tests.helpers.live_router import Live

CHAT = "/v1/chat/completions"


def chat(stream: bool = False, text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "stream": stream,
        **fields,
    }


def texts(answer: raw_http.Answer) -> list[str]:
    events = answer.events
    return [e["choices"][0]["delta"]["content"] for e in events if "choices" in e]


def only(answer: raw_http.Answer) -> str:
    """The name of the engine that answered."""
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])


def idle(live: Live) -> None:
    """Every count has been taken back."""
    assert not live.router.exchanges and not live.router.live
    for engine in live.router.fleet.engines:
        assert (engine.queued, engine.queued_tokens) == (0, 0)
        assert (engine.running, engine.running_tokens) == (0, 0)
    assert live.router.metrics.waiting == live.router.metrics.running == 0
    assert live.router._buffered_bytes == 0
