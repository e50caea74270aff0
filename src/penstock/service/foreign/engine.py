"""A server that is not ours: does it live, what does it serve, what runs there, how fast is it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.service.foreign.config import RouterConfig, engine_name
from penstock.service.foreign.cost import CostFit
from penstock.service.foreign.upstream import Pool
from penstock.service.kv_index.approximate import SentKeys
from penstock.service.policies.correction import TtftCorrection
from penstock.service.recent import Recent

#: connecting: has not answered yet · active · lost: health checks fail, or its connections are
#: refused · draining: an operator wants nothing new there
EngineState = Literal["connecting", "active", "lost", "draining"]

#: A 429 or 503 may ask for a longer pause than this; it is not believed.
_MOST_PAUSE_S = 60.0
#: Nothing is kept for a model whose name is longer.
_MOST_NAME_CHARS = 256


class Breaker:
    """Closed: requests go. Open, after some failures in a row: none. Half-open, after a while: one
    goes, and decides. (Nygard, Release It!)"""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._open_s = config.breaker_open_s
        self.failures = 0
        self.open_until_s: float | None = None
        self._trying = False

    def allows(self, now_s: float) -> bool:
        if self.open_until_s is None:
            return True
        return now_s >= self.open_until_s and not self._trying

    def begin(self) -> None:
        """A request goes; where the breaker is open, it is the one that decides."""
        self._trying = self.open_until_s is not None

    def succeeded(self) -> None:
        self.failures, self.open_until_s, self._trying = 0, None, False
        self._open_s = self._config.breaker_open_s

    def undecided(self) -> None:
        """The request ended without telling anything, as when its client left."""
        self._trying = False

    def failed(self, now_s: float) -> None:
        self.failures += 1
        if self._trying or (
            self.open_until_s is None and self.failures >= self._config.breaker_failures
        ):
            if self._trying:
                self._open_s = min(2 * self._open_s, self._config.breaker_open_at_most_s)
            self.open_until_s = now_s + self._open_s
        self._trying = False

    @property
    def state(self) -> str:
        if self.open_until_s is None:
            return "closed"
        return "half-open" if self._trying else "open"


@dataclass(slots=True)
class Counts:
    """Since the start."""

    requests: int = 0
    failures: int = 0
    #: Requests that went on elsewhere.
    retried: int = 0
    refusals: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    sent_bytes: int = 0


class Engine:
    """Loads here are what this router has placed; `others_*` is what the engine's own metrics say
    beyond that. Tokens are estimates: bytes over `bytes_per_token`."""

    def __init__(self, url: str, config: RouterConfig) -> None:
        self.name = engine_name(url)
        self.url = url
        self.pool = Pool(url, config.connect_timeout_s, config.engine_ca_certs)
        self.state: EngineState = "connecting"
        self.refusal = ""
        #: An operator wants nothing new there, until he says otherwise.
        self.drained = False
        self.failed_checks = 0
        self.heard_s: float | None = None
        #: When a byte of an answer last came from it.
        self.spoke_s = -math.inf
        #: Model cards as the engine gave them, by id; None: it has no list, or was not asked yet.
        self.models: dict[str, dict[str, Any]] | None = None
        self.max_model_len = 0
        self.breaker = Breaker(config)
        #: It has asked for a pause (429 or 503 with Retry-After).
        self.pause_until_s = 0.0
        self.queued = 0
        self.queued_tokens = 0
        self.running = 0
        self.running_tokens = 0
        self.others_queued = 0.0
        self.others_running = 0.0
        self.cost = CostFit()
        self.ttft = TtftCorrection()
        self.recent_ttft_s = Recent()
        self.recent_tpot_s = Recent()
        self.sent: SentKeys
        self.counts = Counts()

    def takes_work(self, now_s: float) -> bool:
        return (
            self.state in ("active", "connecting")
            and now_s >= self.pause_until_s
            and self.breaker.allows(now_s)
        )

    def serves(self, model: str | None) -> bool:
        return model is None or self.models is None or model in self.models

    def pause(self, seconds: float, now_s: float) -> None:
        self.pause_until_s = max(self.pause_until_s, now_s + min(seconds, _MOST_PAUSE_S))

    # --- what operators say ----------------------------------------------------------------------

    def drain(self) -> None:
        self.drained = True
        if self.state != "lost":
            self.state = "draining"

    def start(self) -> None:
        """Takes requests again from its next health check on."""
        self.drained = False
        if self.state == "draining":
            self.state = "connecting"

    # --- where a request of ours stands ----------------------------------------------------------

    def placed(self, work_tokens: int) -> None:
        self.queued += 1
        self.queued_tokens += work_tokens
        self.counts.requests += 1

    def started(self, work_tokens: int, context_tokens: int) -> None:
        """Its first token has come."""
        self.queued -= 1
        self.queued_tokens -= work_tokens
        self.running += 1
        self.running_tokens += context_tokens

    def left(self, started: bool, work_tokens: int, context_tokens: int) -> None:
        if started:
            self.running -= 1
            self.running_tokens -= context_tokens
        else:
            self.queued -= 1
            self.queued_tokens -= work_tokens


@dataclass(slots=True)
class BytesPerToken:
    """Of prompts, by model: what engines counted (`usage`) against what was sent."""

    _ratio: dict[str, float] = field(default_factory=dict)

    def of(self, model: str | None) -> float:
        return self._ratio.get(model or "", 4.0)

    def observe(self, model: str | None, prompt_bytes: int, prompt_tokens: int) -> None:
        if prompt_tokens < 16 or not prompt_bytes or len(model or "") > _MOST_NAME_CHARS:
            return
        ratio = min(max(prompt_bytes / prompt_tokens, 0.5), 32.0)
        known = self._ratio.get(model or "")
        if known is None and len(self._ratio) >= 256:
            return
        self._ratio[model or ""] = ratio if known is None else known + 0.1 * (ratio - known)
