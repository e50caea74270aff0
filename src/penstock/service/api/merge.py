"""Several prompts in one request: their token streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock.service.generation import GenerationSpec, Generator, TokenDelta, TokenStream


def merged_stream(generator: Generator, specs: Sequence[GenerationSpec]) -> TokenStream:
    """Submit all of `specs`, or none: if one is refused, those before it are cancelled."""
    streams: list[TokenStream] = []
    try:
        for spec in specs:
            streams.append(generator.submit(spec))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    if len(streams) == 1:
        return streams[0]
    return MergedStream(streams, [spec.n for spec in specs])


class MergedStream:
    """Choice k of stream i is choice `sum(ns[:i]) + k` here.

    A pump for each stream holds at most one batch until the reader has taken it, so the buffers
    (and their caps) stay where they are: in the streams.
    """

    def __init__(self, streams: Sequence[TokenStream], ns: Sequence[int]) -> None:
        self._streams = streams
        self._first = [sum(ns[:i]) for i in range(len(ns))]
        self._owner = [(i, k) for i, n in enumerate(ns) for k in range(n)]
        self._gathered: list[TokenDelta] = []
        self._ended: set[int] = set()  # choices whose terminal delta has been gathered
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        self._running = len(streams)
        self._pumps = [
            asyncio.get_running_loop().create_task(self._pump(i)) for i in range(len(streams))
        ]

    async def next(self) -> list[TokenDelta]:
        while not self._gathered and self._error is None and self._running:
            await self._news.wait()
            self._news.clear()
        found, self._gathered = self._gathered, []
        self._taken.set()
        self._taken = asyncio.Event()
        if not found and self._error is not None:
            raise self._error
        return found

    def cancel(self, choice: int | None = None) -> None:
        if choice is not None:
            if choice not in self._ended:
                i, k = self._owner[choice]
                self._streams[i].cancel(k)
            return
        for stream in self._streams:
            stream.cancel()
        for pump in self._pumps:
            pump.cancel()

    async def _pump(self, i: int) -> None:
        stream, first = self._streams[i], self._first[i]
        try:
            while deltas := await stream.next():
                taken = self._taken
                self._gathered += [_moved(delta, first) for delta in deltas]
                self._ended.update(first + d.choice for d in deltas if d.finish is not None)
                self._news.set()
                await taken.wait()
        except Exception as exc:
            self._error = exc
        finally:
            self._running -= 1
            self._news.set()


def _moved(delta: TokenDelta, first: int) -> TokenDelta:
    return TokenDelta(
        first + delta.choice,
        delta.ids,
        delta.finish,
        delta.stop_token,
        delta.logprobs,
        delta.prompt_logprobs,
        delta.cached_tokens,
        delta.error,
        delta.queued_s,
    )
