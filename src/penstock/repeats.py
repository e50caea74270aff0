"""A bound on log lines that anybody who reaches a port can cause."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class OneASecond(logging.Filter):
    """Of each of the messages given (as they are before their arguments are filled in) one line a
    second passes; it says how many did not."""

    def __init__(self, *messages: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._next_s = dict.fromkeys(messages, float("-inf"))
        self._left_out = dict.fromkeys(messages, 0)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.msg
        if message not in self._next_s:
            return True
        now = self._clock()
        if now < self._next_s[message]:
            self._left_out[message] += 1
            return False
        self._next_s[message] = now + 1.0
        if count := self._left_out[message]:
            record.msg = f"{message} ({count} more like it since the last line)"
            self._left_out[message] = 0
        return True
