"""Is what the index says true? Predicted against actual hit tokens, by instance.

An index that is wrong routes requests to caches that do not hold their prompts, and nobody notices:
every answer is right, only late. So each first token, which says how many tokens were found in the
cache, is compared with what was predicted for its placement.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Weight of the newest observation.
_GAIN = 0.1
#: Predictions of an instance count for nothing while their error is above the first, until it has
#: fallen below the second. It is measured in shares of the prompt, over prompts of some length.
DISTRUST_ABOVE = 0.5
TRUST_BELOW = 0.2
_MIN_OBSERVED = 8


@dataclass(slots=True)
class Account:
    """One instance's. Token counts are totals since the start."""

    num_observed: int = 0
    predicted_tokens: int = 0
    actual_tokens: int = 0
    #: Sum of |predicted - actual|.
    error_tokens: int = 0
    #: Mean of late of |predicted - actual| / prompt, 0 ... 1; and signed, above 0 where too much
    #: was predicted.
    error: float = 0.0
    bias: float = 0.0
    trusted: bool = True


class HitAudit:
    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        #: Grows whenever somebody gains or loses credit.
        self.version = 0

    def observe(
        self, instance: str, predicted_tokens: int, actual_tokens: int, prompt_tokens: int
    ) -> None:
        """The first token of a placement has come, with the hits that `instance` found."""
        account = self._accounts.setdefault(instance, Account())
        miss = predicted_tokens - actual_tokens
        account.num_observed += 1
        account.predicted_tokens += predicted_tokens
        account.actual_tokens += actual_tokens
        account.error_tokens += abs(miss)
        share = miss / max(1, prompt_tokens)
        gain = max(_GAIN, 1.0 / account.num_observed)
        account.error += gain * (min(1.0, abs(share)) - account.error)
        account.bias += gain * (min(1.0, max(-1.0, share)) - account.bias)
        if account.num_observed >= _MIN_OBSERVED:
            limit = DISTRUST_ABOVE if account.trusted else TRUST_BELOW
            trusted = account.error < limit
            self.version += trusted != account.trusted
            account.trusted = trusted

    def trusts(self, instance: str) -> bool:
        """False: take no hits for granted there; whoever asks falls back to the approximation, or
        to none. It is observed further, and trusted again once predictions hold."""
        account = self._accounts.get(instance)
        return account is None or account.trusted

    def drop(self, instance: str) -> None:
        self._accounts.pop(instance, None)
        self.version += 1

    def accounts(self) -> dict[str, Account]:
        """Live objects, for metrics."""
        return self._accounts
