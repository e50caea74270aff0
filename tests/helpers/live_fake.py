"""The real API over a `FakeGenerator`, behind a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from tests.helpers.fake_generator import FakeGenerator
from tests.helpers.small_checkpoint import make_checkpoint

from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.api.context import Context
from penstock.service.text.texts import Texts

T = TypeVar("T")
MODEL = "small"


@dataclass
class LiveFake:
    url: str
    generator: FakeGenerator
    texts: Texts
    context: Context
    loop: asyncio.AbstractEventLoop

    def call(self, what: Callable[..., T], *args: Any) -> T:
        """Run `what` in the server's loop, where its objects live."""

        async def run() -> T:
            return what(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)


def small_texts(folder: Path, **generation_config: object) -> Texts:
    return Texts.from_checkpoint(
        make_checkpoint(folder, dict(generation_config)), tool_call_parser="hermes"
    )


@contextlib.contextmanager
def live_fake(texts: Texts, **config: Any) -> Iterator[LiveFake]:
    generator = FakeGenerator(texts.tokenizer)
    app = create_app(generator, texts, ApiConfig((MODEL,), **config))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)  # from here on a client waits rather than fails
    settings = uvicorn.Config(app, log_level="error", lifespan="off", access_log=False)
    server = uvicorn.Server(settings)
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        started.set()
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield LiveFake(url, generator, texts, app.state.context, loops[0])
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
        listener.close()
