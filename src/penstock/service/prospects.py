"""What is expected of a sequence before it runs, and how right that was.

Here the journal's entry becomes a policy's `RouteRequest`: which instances hold how much of it
already (the KV index), how long its answer may become, how much time is left. When its first token
comes, predictions meet what happened: hits are audited, predicted times are corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.answer_lengths import AnswerLengths
from penstock.service.cluster.finder import Finder
from penstock.service.cluster.fit import Kind
from penstock.service.cluster.instances import Instance
from penstock.service.cluster.roles import Attainment
from penstock.service.explain import PlacementRecord
from penstock.service.journal import Entry
from penstock.service.policies.view import Floats, Held, RouteRequest
from penstock.service.waiting import Waiting

#: Of answers that have an SLO one in ten may be shorter than what steps are paced for. A hand-over
#: costs about so many steps, which a short answer shares among few tokens.
_HANDOVER_STEPS = 3.0
_MOST_OF_TPOT = 0.9


@dataclass(slots=True)
class Prospects:
    finder: Finder
    #: What the instances are; None until one has attached.
    kind: Kind | None = None
    lengths: AnswerLengths = field(default_factory=AnswerLengths)
    attainment: Attainment = field(default_factory=Attainment)
    #: Decisions made so far.
    num_decisions: int = 0
    #: Who has been placed and has had no token yet.
    waiting: Waiting = field(default_factory=Waiting)
    _able: Sequence[Instance] | None = None
    _names: tuple[str, ...] = ()

    @property
    def model_digest(self) -> str:
        return "" if self.kind is None else self.kind.model_digest

    def request(
        self,
        entry: Entry,
        able: Sequence[Instance],
        prefilled_on: str | None,
        now: float,
        givers: Sequence[Instance] = (),
    ) -> RouteRequest:
        """`entry` as the policies see it, with hits in the order of `able`. `givers` take no work
        and give their blocks away."""
        self.num_decisions += 1
        device_hits, tier_hits = self._hits(entry, able)
        left_s = None
        if entry.ttft_slo_s is not None and not entry.emitted and not entry.overdue:
            left_s = entry.accepted_s + entry.ttft_slo_s - now
        entry.max_step_s = self._max_step_s(entry.tpot_slo_s)
        return RouteRequest(
            num_tokens=entry.num_tokens,
            expected_output_tokens=self.expected_output_tokens(entry),
            request_class=entry.request_class,
            ttft_slo_s=left_s,
            tpot_slo_s=entry.tpot_slo_s,
            max_step_s=entry.max_step_s,
            device_hits=device_hits,
            tier_hits=tier_hits,
            aggregated_because=_why_whole(entry),
            prefilled_on=prefilled_on,
            held=self._held(entry, able, givers, prefilled_on) if givers else (),
            interrupted=entry.interrupted_s is not None,
            number=self.num_decisions,
        )

    def _hits(
        self, entry: Entry, able: Sequence[Instance]
    ) -> tuple[Floats, Floats] | tuple[None, None]:
        keys = entry.block_keys(self.model_digest)
        names = self._names_of(able)
        found = self.finder.hits(keys, names)
        if found is None or not keys:
            return found or (None, None)
        device, tiers = found
        if soon := self.waiting.soon_there(keys):
            there = np.array([soon.get(name, 0) for name in names])
            device = np.maximum(device, there)
        return device, np.maximum(tiers, device)

    def _names_of(self, able: Sequence[Instance]) -> tuple[str, ...]:
        """The same tuple for the same one, as whoever keeps it wants it."""
        if self._able is not able:
            self._names = tuple([i.name for i in able])
            self._able = able if isinstance(able, tuple) else None
        return self._names

    def _held(
        self,
        entry: Entry,
        able: Sequence[Instance],
        givers: Sequence[Instance],
        prefilled_on: str | None,
    ) -> tuple[Held, ...]:
        found = self.finder.hits(entry.block_keys(self.model_digest), [i.name for i in givers])
        hosts = [_host(instance) for instance in able]
        held = []
        for place, giver in enumerate(givers):
            tokens = int(found[0][place]) if found is not None else 0
            if giver.name == prefilled_on:  # all but the last token's KV, whatever the index says
                tokens = max(tokens, (entry.num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
            if tokens:
                near = np.array([host == _host(giver) for host in hosts])
                held.append(Held(name=giver.name, tokens=tokens, near=near))
        return tuple(held)

    def placed(self, instance: Instance, placement: PlacementRecord, now: float) -> None:
        decision = placement.decision
        if decision is not None:
            chosen = [c for c in decision.candidates if c.instance == instance.name]
            instance.experience.prefill.observe(now, sum(c.prefill_s for c in chosen))

    def came_true(self, instance: Instance, placement: PlacementRecord) -> None:
        """The first token of a placement is here."""
        seen, predicted_s = instance.experience, placement.predicted_ttft_s
        if predicted_s and placement.actual_ttft_s and placement.is_prefill:
            seen.ttft.observe(predicted_s, placement.actual_ttft_s)
        predicted, actual = placement.predicted_cached_tokens, placement.cached_tokens
        # What a peer did not give in time is no fault of the index.
        if predicted is not None and actual is not None and placement.source is None:
            self.finder.came_true(instance.name, predicted, actual, placement.num_tokens)

    def ended(self, entry: Entry) -> None:
        record = entry.record
        if record.kept_slo is not None:
            self.attainment.ended(entry.accepted_s, record.kept_slo)
        # Whoever was cut off would have said more: those that run count for as far as they came.
        if entry.emitted and record.finish in ("stop", "length"):
            self.lengths.ended(len(entry.emitted))

    def _max_step_s(self, tpot_slo_s: float | None) -> float | None:
        """With g gaps and a hand-over of k steps, steps of t make a TPOT of t (g + k) / g."""
        if tpot_slo_s is None:
            return None
        gaps = max(self.lengths.short_tokens - 1.0, 2.0)
        return tpot_slo_s * min(1.0 / (1.0 + _HANDOVER_STEPS / gaps), _MOST_OF_TPOT)

    def expected_output_tokens(self, entry: Entry) -> int:
        """What it may still say, or what others have said of late if that is less."""
        most = entry.sampling.max_tokens - len(entry.emitted)
        usual = self.lengths.mean_tokens
        return max(1, min(most, round(usual) - len(entry.emitted))) if usual else most


def _host(instance: Instance) -> str:
    assert instance.card is not None
    return instance.card.host or instance.name


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
