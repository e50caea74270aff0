"""A hash over a history, in order: two runs are the same if their digests are.

Numbers are gathered in chunks, so that it can stay on in large worlds.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Callable
from typing import Any

from penstock.engine.scheduler.batch import Batch
from penstock.protocol.codec import Message
from penstock.protocol.instance import Load
from penstock.protocol.kv import KvEvents
from penstock.protocol.request import Submit
from penstock.protocol.tokens import Tokens
from penstock.service.generation import TokenDelta

_CHUNK = 1 << 14
_DELIVERED, _LAUNCHED, _REPLIED, _HAPPENED = range(4)


class Digest:
    """Times and numbers as float64. Names are numbered as they come."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._numbers = array("d")
        self._names: dict[object, int] = {}
        self._ways: dict[tuple[str, str, type], tuple[int, int, int]] = {}  # of messages

    def delivered(
        self, now: float, source: str, target: str, message: Message, frame: bytes
    ) -> None:
        """`frame`: the message as it travelled; where it did not (b""), what it is about."""
        kind = type(message)
        names = self._ways.get((source, target, kind))
        if names is None:
            names = self._number(source), self._number(target), self._number(kind)
            self._ways[source, target, kind] = names
        gist = _GISTS.get(kind) if not frame else None
        self._add((_DELIVERED, now, *names, *(gist(message) if gist else ())))
        if frame:
            self._take_in()
            self._hash.update(frame)

    def launched(self, now: float, name: str, batch: Batch) -> None:
        self._add((_LAUNCHED, now, self._number(name), batch.step, len(batch.rows)))

    def replied(self, now: float, request_id: str, delta: TokenDelta) -> None:
        last = delta.ids[-1] if delta.ids else -1
        ended = delta.finish is not None
        request = zlib.crc32(request_id.encode())
        self._add((_REPLIED, now, request, delta.choice, len(delta.ids), last, ended))

    def happened(self, now: float, *what: str) -> None:
        """A fault."""
        self._add((_HAPPENED, now, *(self._number(word) for word in what)))

    def hexdigest(self) -> str:
        """Of everything up to now."""
        self._take_in()
        return self._hash.hexdigest()

    def _number(self, name: object) -> int:
        return self._names.setdefault(name, len(self._names))

    def _add(self, numbers: tuple[float, ...]) -> None:
        self._numbers.extend(numbers)
        if len(self._numbers) > _CHUNK:
            self._take_in()

    def _take_in(self) -> None:
        self._hash.update(self._numbers)
        del self._numbers[:]


def _of_tokens(message: Tokens) -> tuple[float, ...]:
    last = message.rows[-1]
    return message.number, len(message.rows), last.start, len(last.ids), last.attempt


def _of_kv_events(message: KvEvents) -> tuple[float, ...]:
    return message.number, len(message.changes), len(message.changes[-1].keys)


def _of_load(message: Load) -> tuple[float, ...]:
    return message.number, message.step, message.step_end_in_s


def _of_submit(message: Submit) -> tuple[float, ...]:
    return message.attempt, len(message.prompt_ids), len(message.resumed_ids)


#: What messages are about, where they do not travel as bytes.
_GISTS: dict[type, Callable[[Any], tuple[float, ...]]] = {
    Tokens: _of_tokens,
    KvEvents: _of_kv_events,
    Load: _of_load,
    Submit: _of_submit,
}
