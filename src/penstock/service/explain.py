"""Why a request went where it went, what was predicted, and where its time was spent.

Each sequence writes a `Record` while it lives; `Explainer` keeps those of the last finished
requests. An `Explanation` is what a person asks for: plain dataclasses, all times in seconds from
the request's acceptance.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from penstock.protocol.kv import Fetched
from penstock.service.policies.view import Decision, WayKind

#: Placements kept of one sequence: its first, and the last ones.
_PLACEMENTS_KEPT = 16
#: Sequences kept under one request's id: as many choices as a request may have.
_RECORDS_KEPT = 128


@dataclass(slots=True)
class PhaseSeconds:
    """Where the time went, up to the last token. Queue: waiting for an instance or in one. Prefill:
    computing what was not cached. Transfer: waiting for blocks from elsewhere (what overlaps with
    the computation of a prompt is not waited for). Lost: on placements that came to nothing."""

    queue_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    lost_s: float = 0.0

    @property
    def total_s(self) -> float:
        return (
            self.queue_s
            + self.encode_s
            + self.prefill_s
            + self.transfer_s
            + self.decode_s
            + self.lost_s
        )


@dataclass(slots=True, kw_only=True)
class PlacementRecord:
    """One attempt: where, why there, and what came of it."""

    attempt: int
    instance: str
    at_s: float
    #: "new", "handover", "migrated: ...", "moved: ..."
    because: str
    #: None where the place was settled by the decision before (a handover as planned).
    decision: Decision | None
    #: Tokens of the sequence at that moment.
    num_tokens: int
    predicted_ttft_s: float | None
    predicted_cached_tokens: int | None
    #: How an interrupted sequence was to go on; None where it was not interrupted.
    way: WayKind | None = None
    actual_ttft_s: float | None = None
    cached_tokens: int | None = None
    queued_s: float | None = None
    #: From whom blocks were to come, and what came.
    source: str | None = None
    fetched: Fetched | None = None
    fetched_at_s: float = 0.0
    #: "stop", "length", "handover", ..., or why it was left; "" while it runs.
    end: str = ""

    @property
    def is_prefill(self) -> bool:
        """It began from a decision about a prompt, not about a sequence that was under way."""
        return self.decision is not None and not self.because.startswith(("hand", "migr"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceExplanation:
    """One choice of a request. `finish` is "" while it lives. TTFT and TPOT are None until there
    are tokens enough to know them (one; two)."""

    choice: int
    finish: str
    prompt_tokens: int
    output_tokens: int
    ttft_slo_s: float | None
    tpot_slo_s: float | None
    predicted_ttft_s: float | None
    ttft_s: float | None
    predicted_tpot_s: float | None
    tpot_s: float | None
    predicted_cached_tokens: int | None
    cached_tokens: int | None
    phases: PhaseSeconds
    placements: tuple[PlacementRecord, ...]
    #: Older ones that are not kept.
    placements_dropped: int


@dataclass(frozen=True, slots=True)
class Explanation:
    request_id: str
    live: bool
    choices: tuple[SequenceExplanation, ...]


@dataclass(slots=True, kw_only=True)
class Record:
    """What one sequence leaves behind. Everything here happens once a placement, not once a token:
    decode time is reckoned from the first and the last token of a placement."""

    request_id: str
    choice: int
    accepted_s: float
    prompt_tokens: int
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    phases: PhaseSeconds = field(default_factory=PhaseSeconds)
    placements: list[PlacementRecord] = field(default_factory=list)
    placements_dropped: int = 0
    finish: str = ""
    output_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float = 0.0
    #: Up to here the time is accounted for.
    _settled_s: float = 0.0
    #: A Fetched that came before its placement (its blocks were fetched ahead).
    _ahead: Fetched | None = None
    _ahead_at_s: float = 0.0

    def __post_init__(self) -> None:
        self._settled_s = self.accepted_s

    @property
    def present(self) -> PlacementRecord | None:
        return self.placements[-1] if self.placements and not self.placements[-1].end else None

    @property
    def kept_slo(self) -> bool | None:
        """Whether a sequence that has ended kept the times that were wanted; None if none were. A
        caller who went away before the first token says nothing."""
        if self.ttft_slo_s is None and self.tpot_slo_s is None:
            return None
        if self.first_token_s is None:
            return None if self.finish == "cancelled" else False
        ttft_s = self.first_token_s - self.accepted_s
        tpot_s = (self.last_token_s - self.first_token_s) / max(1, self.output_tokens - 1)
        late = self.ttft_slo_s is not None and ttft_s > self.ttft_slo_s
        slow = self.tpot_slo_s is not None and tpot_s > self.tpot_slo_s
        return not (late or slow)

    def placed(self, placement: PlacementRecord, now: float) -> None:
        placement.at_s = now - self.accepted_s
        self.phases.queue_s += now - self._settled_s
        self._settled_s = now
        if self._ahead is not None:
            placement.fetched, placement.fetched_at_s = self._ahead, self._ahead_at_s
            self._ahead = None
        if len(self.placements) == _PLACEMENTS_KEPT:
            del self.placements[1]
            self.placements_dropped += 1
        self.placements.append(placement)

    def is_handover(self, fetched: Fetched) -> bool:
        """Whether the blocks went to another place than that which computed them at the time."""
        return any(
            p.attempt == fetched.attempt and p.instance != fetched.instance for p in self.placements
        )

    def fetched(self, fetched: Fetched, now: float) -> None:
        """`fetched.attempt` is the present placement's, or the next one's if it was ahead."""
        present = self.present
        if present is not None and present.instance == fetched.instance:
            if present.fetched is None or fetched.num_wanted:  # else all had come ahead
                present.fetched, present.fetched_at_s = fetched, now
        else:
            self._ahead, self._ahead_at_s = fetched, now

    def started(self, cached_tokens: int, queued_s: float | None, now: float) -> PlacementRecord:
        """The present placement's first token has come. Returns that placement, in which what was
        predicted and what happened now stand side by side."""
        present = self.present
        assert present is not None
        begun_s, left_s = self._settled_s, now - self._settled_s
        present.actual_ttft_s, present.cached_tokens = left_s, cached_tokens
        present.queued_s = queued_s
        transfer_s = 0.0
        if present.fetched is not None:
            until_s = min(now, present.fetched_at_s)
            since_s = max(begun_s, present.fetched_at_s - present.fetched.seconds)
            transfer_s = max(0.0, until_s - since_s)
        queue_s = min(left_s - transfer_s, max(0.0, (queued_s or 0.0) - transfer_s))
        self.phases.transfer_s += transfer_s
        self.phases.queue_s += queue_s
        self.phases.prefill_s += left_s - transfer_s - queue_s
        self._settled_s = now
        if self.first_token_s is None:
            self.first_token_s = now
        return present

    def left(self, end: str, output_tokens: int, last_token_s: float, now: float) -> None:
        """The present placement is over. What has passed since its last token counts as lost,
        unless that token was the end."""
        present = self.present
        if present is None:
            return
        present.end = end
        if present.actual_ttft_s is not None:
            self.phases.decode_s += max(0.0, last_token_s - self._settled_s)
            self._settled_s = max(self._settled_s, last_token_s)
        self.phases.lost_s += now - self._settled_s
        self._settled_s = now
        self.output_tokens, self.last_token_s = output_tokens, last_token_s

    def ended(self, finish: str, output_tokens: int, last_token_s: float) -> None:
        self.finish = finish
        self.output_tokens, self.last_token_s = output_tokens, last_token_s

    def explain(self, output_tokens: int, last_token_s: float) -> SequenceExplanation:
        first, latest = self.placements[:1], self.placements[-1:]
        ttft_s = tpot_s = None
        if self.first_token_s is not None:
            ttft_s = self.first_token_s - self.accepted_s
            if output_tokens > 1:
                tpot_s = (last_token_s - self.first_token_s) / (output_tokens - 1)
        return SequenceExplanation(
            choice=self.choice,
            finish=self.finish,
            prompt_tokens=self.prompt_tokens,
            output_tokens=output_tokens,
            ttft_slo_s=self.ttft_slo_s,
            tpot_slo_s=self.tpot_slo_s,
            predicted_ttft_s=first[0].predicted_ttft_s if first else None,
            ttft_s=ttft_s,
            predicted_tpot_s=_predicted_tpot_s(latest[0]) if latest else None,
            tpot_s=tpot_s,
            predicted_cached_tokens=first[0].predicted_cached_tokens if first else None,
            cached_tokens=first[0].cached_tokens if first else None,
            phases=self._phases_until(last_token_s),
            placements=tuple(self.placements),
            placements_dropped=self.placements_dropped,
        )

    def _phases_until(self, last_token_s: float) -> PhaseSeconds:
        """With the decoding of the placement that still runs."""
        p, present = self.phases, self.present
        decode_s = p.decode_s
        if present is not None and present.actual_ttft_s is not None:
            decode_s += max(0.0, last_token_s - self._settled_s)
        return PhaseSeconds(
            p.queue_s, p.encode_s, p.prefill_s, p.transfer_s, decode_s, p.lost_s
        )  # a copy: the record goes on


def _predicted_tpot_s(placement: PlacementRecord) -> float | None:
    if placement.decision is None:
        return None
    return next(
        (
            c.predicted_tpot_s
            for c in placement.decision.candidates
            if c.instance == placement.instance and c.predicted_tpot_s
        ),
        None,
    )


class Explainer:
    """The records of the last `capacity` requests that have ended, by request id."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._finished: OrderedDict[str, list[Record]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._finished)

    def keep(self, record: Record) -> None:
        """A sequence has ended; its siblings may still live."""
        if not self._capacity:
            return
        records = self._finished.setdefault(record.request_id, [])
        records.append(record)
        del records[:-_RECORDS_KEPT]  # clients of a router may give all requests one name
        self._finished.move_to_end(record.request_id)
        while len(self._finished) > self._capacity:
            self._finished.popitem(last=False)

    def of_request(self, request_id: str) -> list[Record]:
        return list(self._finished.get(request_id, ()))
