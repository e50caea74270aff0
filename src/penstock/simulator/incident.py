"""A recorded run of a service, replayed: the same inputs into a new core, compared step by step.

    for moment in Replay(open_recording(path)):
        ...

The core is that of production. Where its effects differ from those that were recorded, either this
is another release than the one that recorded, or something in the core is not determined by its
inputs, which is a bug.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from penstock.protocol.effects import Effect
from penstock.protocol.errors import PenstockError
from penstock.service.core import ServiceCore
from penstock.service.recording import (
    Recording,
    Step,
    digest_of,
    make_call,
    name_of,
    sends_of,
)


@dataclass(frozen=True, slots=True)
class Moment:
    """One input, and what came of it now. `at_s` from the first input on; `difference`: "" where it
    is what was recorded."""

    number: int
    at_s: float
    call: Any
    effects: list[Effect]
    raised: str
    recorded: Step
    difference: str = ""

    @property
    def name(self) -> str:
        return name_of(self.call)


@dataclass(slots=True)
class Replay:
    """Iterate once. `core` is as it was after the last moment given out."""

    recording: Recording
    core: ServiceCore = field(init=False)
    #: The core's clock at the first input that says what time it is.
    began_s: float | None = None
    _now_s: float = 0.0

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a policy that this release does not have."""
        self.core = self.recording.header.recipe.make()

    def __iter__(self) -> Iterator[Moment]:
        """Up to the first difference, which is the last moment: what follows one means nothing.
        Raises `ConfigError` where a step cannot be read."""
        for number, step in enumerate(self.recording):
            moment = self._moment(number, step)
            yield moment
            if moment.difference:
                return

    def _moment(self, number: int, step: Step) -> Moment:
        now: float | None = getattr(step.call, "now", None)
        if now is not None:
            if self.began_s is None:
                self.began_s = now
            self._now_s = now - self.began_s
        effects: list[Effect] = []
        raised = ""
        try:
            effects = make_call(self.core, step.call)
        except PenstockError as exc:
            raised = exc.code
        except Exception as exc:  # what broke the core then should break it now
            raised = f"{type(exc).__name__}: {exc}"
        difference = _difference(step, effects, raised)
        return Moment(number, self._now_s, step.call, effects, raised, step, difference)


def _difference(step: Step, effects: list[Effect], raised: str) -> str:
    if raised != step.raised:
        return f"it raised {step.raised or 'nothing'} then, and {raised or 'nothing'} now"
    if digest_of(effects) == step.digest and len(effects) == step.num_effects:
        return ""
    then, now = step.sends, sends_of(effects)
    if then != now:
        said = [f"then: {words}" for words in then if words not in now]
        said += [f"now: {words}" for words in now if words not in then]
        return "; ".join(said) or "the same was sent in another order"
    if len(effects) != step.num_effects:
        return f"{step.num_effects} effects then, {len(effects)} now"
    return "the same kinds of effects with other contents"
