"""A server with OpenAI's API that computes nothing: steps on a clock, each with a token for every
stream, as engines have them.

    python -m benchmarks.mock_engine --port 9001 --step-ms 5

With --port 0 it takes a free one. Once it listens it prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import json

import httptools
import uvloop

MODEL = "mock"
_PIECE = json.dumps(
    {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": MODEL,
        "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}],
    }
).encode()
_EVENT = b"data: " + _PIECE + b"\n\n"
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


def whole(num_tokens: int) -> dict[str, object]:
    message = {"role": "assistant", "content": " word" * num_tokens}
    return {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1700000000,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": num_tokens,
            "total_tokens": 100 + num_tokens,
        },
    }


class Engine:
    """Steps while there are streams."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._left: dict[asyncio.Transport, int] = {}

    def add(self, transport: asyncio.Transport, num_tokens: int) -> None:
        if not self._left:
            asyncio.get_running_loop().call_later(self._step_s, self._step)
        self._left[transport] = num_tokens

    def remove(self, transport: asyncio.Transport) -> None:
        self._left.pop(transport, None)

    def _step(self) -> None:
        streams, self._left = self._left, {}
        for transport, left in streams.items():
            if transport.is_closing():
                continue
            transport.write(_CHUNK if left > 1 else _CHUNK + _DONE)
            if left > 1:
                self._left[transport] = left - 1
        if self._left:
            asyncio.get_running_loop().call_later(self._step_s, self._step)


class Connection(asyncio.Protocol):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._path = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.remove(self._transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        if self._parser.get_method() == b"POST":
            asked = json.loads(body)
            num_tokens = int(asked.get("max_tokens", 16))
            if asked.get("stream"):
                self._transport.write(_STREAM_HEAD)
                self._engine.add(self._transport, num_tokens)
                return
            self._answer(whole(num_tokens))
        elif self._path.startswith(b"/v1/models"):
            card = {"id": MODEL, "object": "model", "created": 0, "owned_by": "mock"}
            self._answer({"object": "list", "data": [card]})
        else:
            self._answer({"model_path": MODEL, "served_model_name": MODEL, "status": "ok"})

    def _answer(self, document: object) -> None:
        body = json.dumps(document).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )


async def serve(port: int, step_s: float) -> None:
    engine = Engine(step_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=5.0)
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.step_ms / 1e3))


if __name__ == "__main__":
    main()
