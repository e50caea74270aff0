"""What is expected of a sequence before it runs, and how right that was.

Here the journal's entry becomes a policy's `RouteRequest`: which instances hold how much of it
already (the KV index), how long its answer may become, how much time is left. When its first token
comes, predictions meet what happened: hits are audited, predicted times are corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.protocol.instance import Snapshot
from penstock.protocol.kv import KvEvents
from penstock.service.cluster.instances import Instance
from penstock.service.explain import Record
from penstock.service.journal import Entry
from penstock.service.policies.routing import Floats, RouteRequest

#: Weight of the newest answer in the mean length of answers.
_OUTPUT_WEIGHT = 0.05


class Finder(Protocol):
    """Who holds which leading tokens: an index fed by events, one that guesses, or none."""

    #: Whether instances are asked for `KvEvents`.
    listens: bool

    def attached(self, instance: str) -> bool:
        """Its events begin anew. True: they mean something only after a snapshot."""

    def events(self, instance: str, events: KvEvents) -> bool:
        """Take in what changed. False: something is missing, a snapshot is needed."""

    def snapshot(self, instance: str, snapshot: Snapshot) -> None:
        """What it holds is exactly this."""

    def gone(self, instance: str) -> None:
        """And what it held with it."""

    def hits(self, keys: bytes, names: Sequence[str]) -> tuple[Floats, Floats] | None:
        """Leading tokens with these block keys on the device of each of `names`, and in any of its
        tiers; None where nothing is known."""

    def submitted(self, instance: str, keys: bytes) -> None:
        """A sequence with these keys was sent there."""

    def came_true(self, instance: str, predicted_tokens: int, actual_tokens: int) -> None:
        """What was predicted of a placement, and what the instance found in its cache."""


class NoFinder:
    """Nothing is known of caches."""

    listens = False

    def attached(self, instance: str) -> bool:
        return False

    def events(self, instance: str, events: KvEvents) -> bool:
        return True

    def snapshot(self, instance: str, snapshot: Snapshot) -> None:
        pass

    def gone(self, instance: str) -> None:
        pass

    def hits(self, keys: bytes, names: Sequence[str]) -> tuple[Floats, Floats] | None:
        return None

    def submitted(self, instance: str, keys: bytes) -> None:
        pass

    def came_true(self, instance: str, predicted_tokens: int, actual_tokens: int) -> None:
        pass


@dataclass(slots=True)
class Prospects:
    finder: Finder
    #: Of the model that the instances serve; "" until one has attached.
    model_digest: str = ""
    #: Mean length of the answers of late, in tokens; 0 until there was one.
    mean_output_tokens: float = 0.0
    #: Decisions made so far.
    num_decisions: int = 0

    def request(
        self, entry: Entry, names: Sequence[str], prefilled_on: str | None, now: float
    ) -> RouteRequest:
        """`entry` as the policies see it, with hits in the order of `names`."""
        self.num_decisions += 1
        found = None
        if self.model_digest:
            found = self.finder.hits(entry.block_keys(self.model_digest), names)
        device_hits, tier_hits = found or (None, None)
        left_s = None
        if entry.ttft_slo_s is not None and not entry.emitted:
            left_s = entry.accepted_s + entry.ttft_slo_s - now
        return RouteRequest(
            num_tokens=entry.num_tokens,
            expected_output_tokens=self._expected_output(entry),
            request_class=entry.request_class,
            ttft_slo_s=left_s,
            tpot_slo_s=entry.tpot_slo_s,
            device_hits=device_hits,
            tier_hits=tier_hits,
            aggregated_because=_why_whole(entry),
            prefilled_on=prefilled_on,
            number=self.num_decisions,
        )

    def came_true(self, record: Record, instance: Instance) -> None:
        """The first token of the present placement is here."""
        placement = record.present
        assert placement is not None
        if placement.predicted_cached_tokens is not None and placement.cached_tokens is not None:
            self.finder.came_true(
                instance.name, placement.predicted_cached_tokens, placement.cached_tokens
            )

    def ended(self, output_tokens: int) -> None:
        if not self.mean_output_tokens:
            self.mean_output_tokens = float(output_tokens)
        self.mean_output_tokens += _OUTPUT_WEIGHT * (output_tokens - self.mean_output_tokens)

    def _expected_output(self, entry: Entry) -> int:
        """What it may still say, or what others have said of late if that is less."""
        most = entry.sampling.max_tokens - len(entry.emitted)
        usual = round(self.mean_output_tokens) - len(entry.emitted)
        return most if self.mean_output_tokens == 0.0 else max(1, min(most, usual))


def _why_whole(entry: Entry) -> str:
    """Why a sequence is not to be split between two instances; "" if it may be."""
    if entry.lacks_prompt_logprobs:
        return "its prompt's logprobs are wanted"
    if entry.emitted:
        return "it goes on where it stopped"
    if entry.moves:
        return "a placement of it was lost"
    if entry.sampling.max_tokens <= 1:
        return "one token is wanted"
    return ""
