"""Stop strings across token borders.

An Aho-Corasick automaton (A. V. Aho, M. J. Corasick, 1975) over all stop strings: its state after a
character is the longest suffix of the text that begins a stop string, which is exactly what must
be held back. Constant time a character, whatever the strings.

The stop string that is complete first wins; of several complete at the same character, the longest.
So the result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache

from penstock.protocol.errors import InvalidRequest


class _Automaton:
    """State 0 is the root: nothing matched. `hits[state]` is the stop string complete there."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.goto: list[dict[str, int]] = [{}]
        self.depth: list[int] = [0]
        self.hits: list[str | None] = [None]
        self.fail: list[int] = [0]
        for stop in stops:
            self._insert(stop)
        self._link()
        firsts = "".join(dict.fromkeys(stop[0] for stop in stops))
        self.first_char = re.compile("[" + re.escape(firsts) + "]")

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.goto[state]:
                self.goto[state][char] = len(self.goto)
                self.goto.append({})
                self.depth.append(self.depth[state] + 1)
                self.hits.append(None)
                self.fail.append(0)
            state = self.goto[state][char]
        self.hits[state] = stop

    def _link(self) -> None:
        """Failure links, breadth first: the longest proper suffix that is a state, too."""
        queue = deque(self.goto[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.goto[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                if self.hits[child] is None:
                    self.hits[child] = self.hits[self.fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        while True:
            following = self.goto[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self.fail[state]


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)


class StopChecker:
    """`push` text; what comes back can be sent. After a hit, nothing more comes.

    Raises `InvalidRequest` for an empty stop string.
    """

    def __init__(self, stops: tuple[str, ...], include_stop_str_in_output: bool = False) -> None:
        if not stops or not all(stops):
            raise InvalidRequest("stop strings must not be empty", param="stop")
        self._automaton = _automaton(stops)
        self._include = include_stop_str_in_output
        self._state = 0
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is final, the stop string that ended it or None)."""
        if self.hit is not None:
            return "", self.hit
        machine = self._automaton
        state = self._state
        if state == 0 and machine.first_char.search(text) is None:
            return text, None
        hits, step = machine.hits, machine.step
        whole = self._held + text
        for position, char in enumerate(text, len(self._held) + 1):
            state = step(state, char)
            hit = hits[state]
            if hit is not None:
                self.hit, self._held, self._state = hit, "", 0
                end = position if self._include else position - len(hit)
                return whole[:end], hit
        self._state = state
        border = len(whole) - machine.depth[state]
        self._held = whole[border:]
        return whole[:border], None

    def flush(self) -> str:
        """What was held back, when the text has ended without a hit."""
        held, self._held, self._state = self._held, "", 0
        return held
