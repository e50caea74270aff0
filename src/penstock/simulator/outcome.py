"""What came of a simulated run: each request's times, and what the cluster did meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock.simulator.gaps import GapHistogram
from penstock.simulator.spec import ClusterSpec, FaultSpec

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RoleChange:
    at_s: float
    instance: str
    role: str


@dataclass(frozen=True, slots=True)
class Sample:
    """The cluster at one moment, one number for each instance in the order of `instances`."""

    at_s: float
    roles: tuple[str, ...]
    #: Seconds computed since the sample before, over the seconds between.
    busy: npt.NDArray[np.float32]
    running: npt.NDArray[np.int32]
    waiting: npt.NDArray[np.int32]
    kv_used: npt.NDArray[np.float32]


@dataclass(slots=True)
class Outcome:
    """Arrays have one element for each request of the trace, in its order. Times are virtual
    seconds since the first arrival; NaN: it never came to that (`finish` says why)."""

    spec: ClusterSpec
    seed: int
    mode: str
    instances: tuple[str, ...]
    arrival_s: Floats
    first_s: Floats
    end_s: Floats
    input_tokens: Floats
    output_tokens: Floats
    cached_tokens: Floats
    finish: list[str]
    samples: list[Sample] = field(default_factory=list)
    role_changes: list[RoleChange] = field(default_factory=list)
    handovers: int = 0
    resumed: int = 0
    preemptions: int = 0
    #: Positions that all instances together have computed, some of them more than once.
    computed_tokens: int = 0
    #: Seconds that each instance has computed, and when the last answer was out.
    busy_s: Floats = field(default_factory=lambda: np.zeros(0))
    end_of_run_s: float = 0.0
    #: Between two tokens as clients saw them; tokens that came together share what passed.
    gaps: GapHistogram = field(default_factory=GapHistogram)
    #: What the spec asks for and did not happen, with the reason.
    idle_faults: dict[FaultSpec, str] = field(default_factory=dict)
    #: Events on the virtual clock, and seconds and CPU seconds that the run took in the real world.
    events: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    #: sha256 over everything that was delivered, launched and replied, in order.
    digest: str = ""

    @property
    def ttft_s(self) -> Floats:
        return self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Seconds a token after the first; NaN where there was only one."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        found: Floats = (self.end_s - self.first_s) / gaps
        return found

    @property
    def span_s(self) -> float:
        """From the first arrival to the last answer, or to the last arrival where that is later;
        1 where all is over at once."""
        ends = self.end_s[~np.isnan(self.end_s)]
        span_s = max(float(self.arrival_s[-1]), float(ends.max()) if len(ends) else 0.0)
        return span_s if span_s > 0 else 1.0

    def held_s(self, share: float) -> tuple[float, float]:
        """The TTFT, and the TPOT, that this share of the requests had at most; infinite where so
        many never came to that. Who got no token waited longer than all others, and one token has
        no TPOT."""
        ttft_s = np.where(np.isnan(self.ttft_s), np.inf, self.ttft_s)
        tpot_s = self.tpot_s[~np.isnan(self.tpot_s)]
        return _at(ttft_s, share), _at(tpot_s, share)

    @property
    def utilisation(self) -> Floats:
        """The share of the run that each instance computed."""
        found: Floats = self.busy_s / self.end_of_run_s
        return found

    @property
    def kv_hit_rate(self) -> float:
        """The share of all prompt tokens that were found in a cache; NaN where there were none."""
        asked = self._answered(self.input_tokens)
        return self._answered(self.cached_tokens) / asked if asked else float("nan")

    @property
    def recomputed_tokens(self) -> int:
        """Tokens computed beyond what it takes to compute each once: after preemptions, for
        placements that were lost, and where blocks could not be fetched."""
        once = self._answered(self.input_tokens - self.cached_tokens + self.output_tokens - 1)
        return self.computed_tokens - round(once)

    def _answered(self, tokens: Floats) -> float:
        """Summed over requests with at least one token."""
        return float(tokens[self.output_tokens > 0].sum())

    def attained(self, ttft_slo_s: float, tpot_slo_s: float) -> npt.NDArray[np.bool_]:
        """Requests that were answered, with TTFT and TPOT within the SLOs."""
        answered = np.array([f in ("stop", "length") for f in self.finish], dtype=np.bool_)
        in_time = self.ttft_s <= ttft_slo_s
        steady = np.isnan(self.tpot_s) | (self.tpot_s <= tpot_slo_s)
        return answered & in_time & steady


def _at(seconds: Floats, share: float) -> float:
    return float(np.quantile(seconds, share, method="higher")) if len(seconds) else np.inf
