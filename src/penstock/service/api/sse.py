"""The two ways an answer leaves: as server-sent events, or whole.

Streams are sent by our own ASGI response: one `send` for all chunks that are ready, awaited, so
that a slow reader holds back its own request and nobody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.protocol.errors import PenstockError
from penstock.service.api.errors import ClientDisconnected, error_body, internal_error
from penstock.service.api.run import Run, Update

DONE = b"data: [DONE]\n\n"


class Renderer(Protocol):
    def chunk(self, update: Update) -> bytes:
        """The events for a stream; may be empty."""

    def end(self) -> bytes:
        """The events that follow the last chunk, before [DONE]."""

    def collect(self, update: Update) -> None:
        """Keep what `whole` will need."""

    def whole(self) -> bytes:
        """The JSON document of an answer that is not streamed."""


class Watch:
    """Listens for the client's disconnect while an answer is made."""

    def __init__(self, receive: Receive, on_gone: Callable[[], None]) -> None:
        self._task = asyncio.get_running_loop().create_task(_listen(receive, on_gone))

    def stop(self) -> None:
        self._task.cancel()


async def _listen(receive: Receive, on_gone: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    on_gone()


async def respond(request: Request, run: Run, renderer: Renderer, stream: bool) -> Response:
    """Answers come with their first token, so that an error before it has its own HTTP status."""
    watch = Watch(request.receive, run.disconnect)
    try:
        if not stream:
            while updates := await run.next():
                for update in updates:
                    renderer.collect(update)
            body = renderer.whole()
            run.close()
            watch.stop()
            return Response(body, media_type="application/json")
        first = b""
        while not first and (updates := await run.next()):
            first = b"".join([renderer.chunk(update) for update in updates])
        return EventStream(first, run, renderer, watch)
    except BaseException:
        run.close()
        watch.stop()
        raise


class EventStream(Response):
    """Sends a run's chunks until its terminal event; always ends with [DONE] if anybody listens."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, run: Run, renderer: Renderer, watch: Watch) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._run = run
        self._renderer = renderer
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = await self._send_chunks(send)
        except ClientDisconnected:
            return
        except PenstockError as exc:
            last = _error_event(exc)
        except Exception as exc:
            last = _error_event(internal_error(exc))
        finally:
            self._run.close()
            self._watch.stop()
        await send({"type": "http.response.body", "body": last + DONE, "more_body": False})

    async def _send_chunks(self, send: Send) -> bytes:
        """All but the last piece, which is returned."""
        run, chunk = self._run, self._renderer.chunk
        body = self._first
        while not run.finished:
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            body = b"".join([chunk(update) for update in await run.next()])
        return body + self._renderer.end()


def _error_event(exc: PenstockError) -> bytes:
    return b"data: " + msgspec.json.encode(error_body(exc)) + b"\n\n"
