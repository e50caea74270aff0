"""What became of the placements on one instance: predictions against what happened, and times."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.service.explain import PlacementRecord, Record
from penstock.service.recent import Recent


@dataclass(slots=True)
class Outcomes:
    """Sums since the start, for /metrics; and times of late, for people.

    TTFT counts from the placement, TPOT within one placement: what an instance can answer for.
    """

    #: Placements that came to a first token here; those of them with a prediction.
    num_started: int = 0
    num_ttft: int = 0
    predicted_ttft_s: float = 0.0
    actual_ttft_s: float = 0.0
    #: Sum of |predicted - actual|.
    ttft_error_s: float = 0.0
    #: Prompt tokens that were expected in the instance's cache, and that it found.
    num_hits: int = 0
    predicted_hit_tokens: int = 0
    actual_hit_tokens: int = 0
    hit_error_tokens: int = 0
    recent_ttft_s: Recent = field(default_factory=lambda: Recent(capacity=512))
    recent_tpot_s: Recent = field(default_factory=lambda: Recent(capacity=512))

    def started(self, placement: PlacementRecord, now: float) -> None:
        """Its first token has come."""
        self.num_started += 1
        actual_s = placement.actual_ttft_s
        if actual_s is not None:
            self.recent_ttft_s.add(actual_s, now)
            if placement.predicted_ttft_s:
                self.num_ttft += 1
                self.predicted_ttft_s += placement.predicted_ttft_s
                self.actual_ttft_s += actual_s
                self.ttft_error_s += abs(placement.predicted_ttft_s - actual_s)
        predicted, found = placement.predicted_cached_tokens, placement.cached_tokens
        if predicted is not None and found is not None:
            self.num_hits += 1
            self.predicted_hit_tokens += predicted
            self.actual_hit_tokens += found
            self.hit_error_tokens += abs(predicted - found)

    def left(self, record: Record, output_tokens: int, last_token_s: float) -> None:
        """The present placement of the sequence is over (before the record is told)."""
        placement = record.present
        if placement is None or placement.actual_ttft_s is None:
            return
        first_token_s = record.accepted_s + placement.at_s + placement.actual_ttft_s
        num_tokens = record.prompt_tokens + output_tokens - placement.num_tokens - 1
        if num_tokens > 0:
            self.recent_tpot_s.add((last_token_s - first_token_s) / num_tokens, last_token_s)

    @property
    def ttft_ratio(self) -> float | None:
        """Actual over predicted, over all of them; None where nothing was predicted."""
        return self.actual_ttft_s / self.predicted_ttft_s if self.predicted_ttft_s else None
