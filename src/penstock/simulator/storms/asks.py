"""The requests of a storm: their prompts, the right answers, and what their callers see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from penstock.protocol.errors import ErrorInfo, PenstockError
from penstock.protocol.request import SamplingParams
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.simulator.runner import next_token
from penstock.simulator.storms.storm import Ask
from penstock.simulator.world import VOCAB_SIZE

EOS = 0
#: Prompts never have the token that ends a sequence.
_IDS = VOCAB_SIZE - 1


class WrongReply(AssertionError):
    """A caller has seen what it never should."""


def prompt_of(ask: Ask) -> list[int]:
    shared = [(ask.family * 331 + place * 7) % _IDS + 1 for place in range(ask.shared_tokens)]
    own = [(ask.number * 101 + place * 13 + 5) % _IDS + 1 for place in range(ask.own_tokens)]
    return shared + own


def spec_of(ask: Ask) -> GenerationSpec:
    return GenerationSpec(
        request_id=f"r{ask.number}",
        prompt_ids=prompt_of(ask),
        sampling=SamplingParams(max_tokens=ask.max_tokens),
        n=ask.n,
        request_class=ask.request_class,
        priority=ask.priority,
        cache_salt=ask.salt,
        total_budget_s=ask.budget_s,
        ttft_slo_s=ask.ttft_slo_s,
    )


@lru_cache(maxsize=4096)
def right_answer(ask: Ask) -> tuple[int, ...]:
    """What the simulated model says when nothing goes wrong."""
    ids = prompt_of(ask)
    num_prompt = len(ids)
    while len(ids) - num_prompt < ask.max_tokens:
        ids.append(next_token(ids, VOCAB_SIZE))
        if ids[-1] == EOS:
            break
    return tuple(ids[num_prompt:])


@dataclass(slots=True)
class _Choice:
    num_tokens: int = 0
    end: str = ""
    error: ErrorInfo | None = None
    ended_s: float = 0.0


@dataclass(slots=True)
class Caller:
    """Who made one request; raises `WrongReply` at the first word that is wrong. `clock()`: the
    world's time in seconds."""

    ask: Ask
    clock: Callable[[], float]
    choices: list[_Choice] = field(default_factory=list)
    #: It has asked.
    began: bool = False
    #: "" while it waits; "refused", "cancelled", "reset": nothing more is to come.
    over: str = ""
    refusal: ErrorInfo | None = None
    refused_s: float = 0.0

    def __post_init__(self) -> None:
        self.choices = [_Choice() for _ in range(self.ask.n)]

    def take(self, delta: TokenDelta) -> None:
        name = f"r{self.ask.number}/{delta.choice}"
        choice = self.choices[delta.choice]
        if self.over:
            raise WrongReply(f"a word for {name}, whose caller is gone ({self.over})")
        if choice.end:
            raise WrongReply(f"{name} has ended with {choice.end!r} and gets another word")
        wanted = right_answer(self.ask)
        begin, choice.num_tokens = choice.num_tokens, choice.num_tokens + len(delta.ids)
        if tuple(delta.ids) != wanted[begin : choice.num_tokens]:
            raise WrongReply(f"{name} has wrong tokens from its {begin}th on")
        if delta.finish is not None:
            self._ends(name, choice, delta)

    def _ends(self, name: str, choice: _Choice, delta: TokenDelta) -> None:
        assert delta.finish is not None
        choice.end, choice.error, choice.ended_s = delta.finish, delta.error, self.clock()
        if delta.finish == "error":
            if delta.error is None:
                raise WrongReply(f"{name} ends with an error that has no type")
            return
        wanted = right_answer(self.ask)
        reason = "stop" if wanted[-1] == EOS else "length"
        if delta.finish != reason or choice.num_tokens != len(wanted):
            raise WrongReply(
                f"{name} ends with {delta.finish!r} after {choice.num_tokens} tokens; right were "
                f"{reason!r} and {len(wanted)}"
            )

    def refused(self, error: PenstockError) -> None:
        self.over, self.refusal, self.refused_s = "refused", error.info(), self.clock()

    def goes_away(self) -> None:
        if self.waits:
            self.over = "cancelled"

    def reset(self) -> None:
        """The service's process is gone, and the connection with it."""
        if self.waits:
            self.over = "reset"

    @property
    def waits(self) -> bool:
        return not self.over and not all(choice.end for choice in self.choices)
