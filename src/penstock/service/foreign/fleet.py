"""The engines together: who may take a request, what each would cost, and which one it is."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penstock.protocol.errors import EngineUnavailable, ModelNotFound, Overloaded, PenstockError
from penstock.service.foreign.asked import CHUNK_BYTES, Asked
from penstock.service.foreign.config import RouterConfig
from penstock.service.foreign.cost import STEP_TOKENS
from penstock.service.foreign.engine import BytesPerToken, Engine
from penstock.service.kv_index.approximate import NOTE, SentKeys
from penstock.service.kv_index.audit import HitAudit
from penstock.service.policies.predict import speeds
from penstock.service.policies.routing import (
    ROLES,
    ClusterView,
    Decision,
    Floats,
    RouteRequest,
    policy_named,
)

log = logging.getLogger(__name__)

_STORED_RESPONSES = 16_384
_ANY_ROLE = ROLES.index("any")
#: Costs are fitted with every answer; a decision is none the worse for those of a moment ago.
_KNOWN_FOR_S = 0.05


@dataclass(frozen=True, slots=True)
class Choice:
    engine: Engine
    decision: Decision
    #: Of the prompt, and of it believed to be in the engine's cache; both estimated.
    num_tokens: int
    hit_tokens: int


def _load(e: Engine) -> tuple[float, ...]:
    mean = e.queued_tokens / e.queued if e.queued else 0.0
    return (
        e.queued_tokens + e.others_queued * mean,
        e.queued + e.others_queued,
        e.running + e.others_running,
        e.running_tokens,
    )


def _what_they_are_like(engines: Sequence[Engine]) -> dict[str, Any]:
    """The fields of a `ClusterView` that requests do not change. Roles, room and hosts are not
    known of servers of others: any role, room without end, a host each."""
    size = len(engines)
    costs = [e.cost.model() for e in engines]
    no_end, nothing = np.full(size, np.inf), np.zeros(size)
    known: dict[str, Any] = {
        name: np.array([getattr(cost, name) for cost in costs], np.float64)
        for name in ("base_s", "per_token_s", "per_row_s", "residual_s", "num_steps")
    }
    known |= {name: no_end for name in ("max_running", "free_blocks", "total_blocks")}
    known |= {name: nothing for name in ("step_left_s", "per_context_token_s", "per_attention_s")}
    known["ttft_ratio"] = np.array([e.ttft.ratio for e in engines])
    known["ttft_error"] = np.array([e.ttft.error for e in engines])
    known["step_tokens"] = np.full(size, float(STEP_TOKENS))
    known["roles"], known["hosts"] = np.full(size, _ANY_ROLE), np.arange(size)
    loads: dict[str, Any] = {
        name: nothing for name in ("queued_tokens", "queued", "running", "running_tokens")
    }
    idle = ClusterView(names=tuple(e.name for e in engines), **loads, **known)
    return known | {"speeds": speeds(idle)}


class Fleet:
    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self.config = config
        self.clock = clock
        self.engines = [Engine(url, config) for url in config.engines]
        self.by_name = {engine.name: engine for engine in self.engines}
        self.bytes_per_token = BytesPerToken()
        self.audit = HitAudit()
        self.output_tokens = 128.0
        self._policy = policy_named(config.policy)
        self._blind = config.policy in ("round-robin", "least-load")
        self._number = 0
        self._responses: OrderedDict[str, str] = OrderedDict()
        self._known: dict[str, Any] = {}
        self._known_names: tuple[str, ...] = ()
        self._known_until_s = 0.0
        capacity = max(1, config.engine_cache_tokens * 4 // CHUNK_BYTES)
        for engine in self.engines:
            engine.sent = SentKeys(capacity)

    # --- choosing ------------------------------------------------------------------------------

    def choose(self, asked: Asked, avoid: Iterable[Engine] = ()) -> Choice:
        """Raises `ModelNotFound`, or `EngineUnavailable` or `Overloaded` where nobody takes it."""
        now_s = self.clock()
        engines = self._candidates(asked, avoid, now_s)
        num_tokens = self.tokens_of(asked)
        hits = self._hits(asked, engines, num_tokens)
        expected = int(self.output_tokens)
        if asked.max_tokens is not None:
            expected = min(expected, asked.max_tokens)
        request = RouteRequest(
            num_tokens=num_tokens,
            expected_output_tokens=expected,
            ttft_slo_s=self.config.ttft_slo_s,
            tpot_slo_s=self.config.tpot_slo_s,
            device_hits=None if self._blind else hits,
            aggregated_because="engines of others do not hand over",
            number=self._number,
        )
        self._number += 1
        decision = self._policy(self._view(engines, now_s), request)
        place = next(i for i, e in enumerate(engines) if e.name == decision.instance)
        return Choice(engines[place], decision, num_tokens, int(hits[place]))

    def tokens_of(self, asked: Asked) -> int:
        return max(1, round(asked.prompt_bytes / self.bytes_per_token.of(asked.model)))

    def explained(self, decision: Decision) -> Decision:
        """With what is a guess in it named."""
        if self._blind:
            return decision
        return replace(decision, reason=f"{decision.reason}; {NOTE}, tokens from bytes")

    def _candidates(self, asked: Asked, avoid: Iterable[Engine], now_s: float) -> list[Engine]:
        serving = [e for e in self.engines if e.serves(asked.model)]
        if not serving:
            raise self._no_model(asked.model)
        if asked.response_id is not None:
            owner = self._responses.get(asked.response_id)
            serving = [e for e in serving if e.name == owner] or serving
        avoid = tuple(avoid)
        engines = [e for e in serving if e not in avoid and e.takes_work(now_s)]
        # Those that have never answered are for when there is nobody else.
        engines = [e for e in engines if e.state == "active"] or engines
        if not engines:
            raise self._nobody(serving, now_s)
        return engines

    def _no_model(self, model: str | None) -> PenstockError:
        known = sorted({name for e in self.engines for name in e.models or ()})
        listed = ", ".join(known[:8]) or "none"
        return ModelNotFound(
            f"no engine serves the model {str(model)[:200]!r} (there are: {listed})", param="model"
        )

    def _nobody(self, serving: Sequence[Engine], now_s: float) -> PenstockError:
        pausing = [e for e in serving if e.pause_until_s > now_s and e.state == "active"]
        if pausing:
            soonest_s = min(e.pause_until_s for e in pausing) - now_s
            return Overloaded(
                "every engine that could take the request has asked for a pause: try again later",
                retry_after_s=soonest_s,
            )
        states = ", ".join(
            f"{e.name} {e.state}"
            + (f", breaker {e.breaker.state}" if e.breaker.state != "closed" else "")
            for e in serving[:8]
        )
        return EngineUnavailable(f"no engine takes requests ({states})", retry_after_s=1.0)

    def _hits(self, asked: Asked, engines: Sequence[Engine], num_tokens: int) -> Floats:
        keys = asked.keys
        if not keys:
            return np.zeros(len(engines))
        per_chunk = CHUNK_BYTES / self.bytes_per_token.of(asked.model)
        found = [e.sent.leading(keys) if self.audit.trusts(e.name) else 0 for e in engines]
        tokens: Floats = np.minimum(np.array(found, np.float64) * per_chunk, num_tokens)
        return tokens

    def _view(self, engines: Sequence[Engine], now_s: float) -> ClusterView:
        """Loads as they are now; what engines are like as of `_KNOWN_FOR_S` ago at most."""
        names = tuple(e.name for e in engines)
        if names != self._known_names or now_s >= self._known_until_s:
            self._known_names, self._known_until_s = names, now_s + _KNOWN_FOR_S
            self._known = _what_they_are_like(engines)
        loads = np.array([_load(e) for e in engines], np.float64).T
        return ClusterView(
            names=names,
            queued_tokens=loads[0],
            queued=loads[1],
            running=loads[2],
            running_tokens=loads[3],
            **self._known,
        )

    # --- what answers tell ---------------------------------------------------------------------

    def remember_response(self, response_id: str, engine: Engine) -> None:
        self._responses[response_id] = engine.name
        while len(self._responses) > _STORED_RESPONSES:
            self._responses.popitem(last=False)

    def generated(self, num_tokens: int) -> None:
        self.output_tokens += 0.02 * (num_tokens - self.output_tokens)

    # --- what is there -------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return any(e.state == "active" for e in self.engines)

    def lists(self, model: str | None) -> bool:
        return any(model in e.models for e in self.engines if e.models)

    def models(self) -> list[dict[str, Any]]:
        """Cards of all engines that live, each model once."""
        found: dict[str, dict[str, Any]] = {}
        for engine in self.engines:
            if engine.state in ("active", "draining"):
                for name, card in (engine.models or {}).items():
                    found.setdefault(name, card)
        return list(found.values())
