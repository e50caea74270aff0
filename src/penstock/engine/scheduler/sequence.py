"""One sequence as the scheduler sees it: tokens to compute and tokens computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from penstock.engine.scheduler.batch import BatchRow, NewSequence, RowResult
from penstock.engine.scheduler.stopping import Stop, check_stop
from penstock.protocol.errors import ErrorInfo
from penstock.protocol.kv import block_keys, next_key, root_key, split_keys
from penstock.protocol.request import RequestClass, SamplingParams, Submit
from penstock.protocol.tokens import FinishReason, TokenLogprobs

Key = tuple[str, str]  # (service, request_id)
Flow = tuple[str, str]  # (service, cache_salt): between whom tokens are shared fairly

#: In the order in which they are served.
CLASSES: tuple[RequestClass, ...] = ("online", "offline")


def sealed_keys(owner: Key, keys: list[bytes]) -> list[bytes]:
    """What stands for `keys` where prefixes are not shared: each instance that has to do with the
    request `owner` arrives at them, and no other request does."""
    service, request_id = owner
    return [root_key("sealed", service, request_id, [key]) for key in keys]


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"  # has a slot
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Counters are in tokens and only the scheduler writes them.

    0 <= num_confirmed <= num_computed < num_tokens:

    - `num_confirmed`: KV written by steps whose results have been applied,
    - `num_computed`: KV written, or to be written by a step in flight,
    - `num_tokens`: known ids and, after them, `num_placeholders` ids that steps in flight sample.

    `run` counts residences: it grows when the sequence loses its blocks, so that a late result of
    an earlier residence is not taken for KV of this one. Its sampled ids are still good, unless
    that residence was spoilt (`spoilt_run`: up to this one nothing in flight counts).

    Who prefills here and decodes elsewhere has nothing to compute beyond its first new token
    (`num_tokens_here`).
    """

    submit: Submit
    arrival: int
    max_total_tokens: int  # prompt + output may not grow beyond
    public: bool  # its keys follow from the service's: others may match or ask for them
    keys: list[bytes]  # of the whole blocks, as far as they have been named
    token_ids: list[int]
    num_prompt_logprobs_sent: int | None  # prompt positions 1 ... n are out; None: not wanted
    state: State = State.WAITING
    num_confirmed: int = 0
    num_computed: int = 0
    num_placeholders: int = 0
    num_keyed_blocks: int = 0  # leading blocks registered in (or taken from) the prefix cache
    blocks: list[int] = field(default_factory=list)
    stale_maps: list[int] = field(default_factory=list)  # block indices the runner must (re)map
    slot: int = -1
    run: int = 0
    spoilt_run: int = -1
    awaited_key: bytes = b""  # that others store it: why it did not come in when last looked at
    is_new: bool = True  # the runner does not know this residence yet
    trusted: bool = True  # its KV may be named (false after a cache reset, until recomputed)
    num_preemptions: int = 0
    cached_tokens: int = 0  # prompt tokens found in the cache at the first admission
    cached_tokens_told: bool = False
    hands_over: bool = False  # after its first new token it goes on elsewhere
    unsealed_key: bytes = b""  # the service's key of the block named last, if keys are sealed
    # Marks of whoever drives the scheduler and has a clock; None until set.
    arrived_s: float | None = None
    started_s: float | None = None
    # Taken out of `submit`, as every step asks for them:
    service: str = field(init=False)
    attempt: int = field(init=False)
    sampling: SamplingParams = field(init=False)
    request_class: RequestClass = field(init=False)
    num_prompt_tokens: int = field(init=False)
    key: Key = field(init=False)
    flow: Flow = field(init=False)
    rank: tuple[int, int, int] = field(init=False)  # lower is served first, preempted last
    num_tokens_here: int = field(init=False)

    def __post_init__(self) -> None:
        submit = self.submit
        self.service = submit.service
        self.attempt = submit.attempt
        self.sampling = submit.sampling
        self.request_class = submit.request_class
        self.num_prompt_tokens = len(submit.prompt_ids)
        self.key = (submit.service, submit.request_id)
        self.flow = (submit.service, submit.cache_salt)
        self.num_tokens_here = self.max_total_tokens
        if self.hands_over:
            self.num_tokens_here = min(self.max_total_tokens, len(self.token_ids) + 1)
        self.rank = (CLASSES.index(submit.request_class), submit.priority, self.arrival)

    @classmethod
    def of(
        cls, submit: Submit, arrival: int, max_len: int, caching: bool, hands_over: bool = False
    ) -> Sequence:
        """`max_len`: total tokens one sequence may reach here; `caching`: may KV be shared;
        `hands_over`: prefill only. Without caching only what moves between instances has keys of
        the service's, and those are sealed."""
        num_prompt = len(submit.prompt_ids)
        wants_prompt_logprobs = submit.sampling.prompt_logprobs is not None
        moves = hands_over or submit.kv_source is not None
        keys = split_keys(submit.block_keys) if caching or moves else []
        unsealed_key = b"" if caching or not keys else keys[-1]
        if unsealed_key:
            keys = sealed_keys((submit.service, submit.request_id), keys)
        return cls(
            submit=submit,
            arrival=arrival,
            max_total_tokens=min(num_prompt + submit.sampling.max_tokens, max_len),
            public=bool(keys),
            keys=keys,
            token_ids=submit.prompt_ids + submit.resumed_ids,
            # Who resumes with output has had the prompt's logprobs from an earlier attempt.
            num_prompt_logprobs_sent=(
                0 if wants_prompt_logprobs and not submit.resumed_ids else None
            ),
            hands_over=hands_over,
            unsealed_key=unsealed_key,
        )

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_to_compute(self) -> int:
        """Zero when the ids in flight are certainly its last ones."""
        num_tokens = len(self.token_ids) + self.num_placeholders
        return num_tokens - self.num_computed if num_tokens < self.num_tokens_here else 0

    @property
    def never_stops(self) -> bool:
        """Do its limits alone end it?"""
        sampling = self.sampling
        constrained = self.submit.constraint is not None
        return sampling.ignore_eos and not (sampling.stop_token_ids or constrained)

    @property
    def has_drawn(self) -> bool:
        """Has a token been drawn here (in this attempt), or is one in flight?"""
        submit = self.submit
        return self.num_tokens > len(submit.prompt_ids) + len(submit.resumed_ids)

    def name_up_to(self, num_blocks: int, block_tokens: int) -> None:
        """Make the keys of the first `num_blocks` whole blocks, whose ids are known.

        Where the service gave no keys the chain hangs from a root that no other sequence has:
        such blocks serve only this sequence's own return after a preemption.
        """
        keys, ids = self.keys, self.token_ids
        assert num_blocks * block_tokens <= len(ids), "a key needs a whole block"
        if not keys and num_blocks:
            root = root_key("private", salt=str(self.arrival))
            keys.append(next_key(root, ids[:block_tokens]))
        named, end = len(keys) * block_tokens, num_blocks * block_tokens
        if named < end:
            parent = self.unsealed_key or keys[-1]
            new = split_keys(block_keys(parent, ids[named:end], block_tokens))
            if self.unsealed_key and new:
                self.unsealed_key = new[-1]
                new = sealed_keys(self.key, new)
            keys += new

    def take_slot(self, slot: int, hits: list[int], block_tokens: int) -> None:
        """It runs from now on, and begins with cached blocks."""
        self.state = State.RUNNING
        self.slot = slot
        self.blocks = list(hits)
        self.stale_maps = list(range(len(hits)))
        self.num_keyed_blocks = len(hits)
        self.num_computed = self.num_confirmed = len(hits) * block_tokens

    def lose_slot(self) -> None:
        """Without its blocks nothing is computed any more; ids in flight still count."""
        self.slot = -1
        self.blocks = []
        self.stale_maps = []
        self.num_computed = self.num_confirmed = self.num_keyed_blocks = 0
        self.run += 1
        self.is_new = self.trusted = True

    def new_sequence(self) -> NewSequence:
        """What the runner must know when the sequence takes its slot."""
        return NewSequence(
            slot=self.slot,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.sampling,
            choice=self.submit.choice,
            constraint=self.submit.constraint,
            adapter=self.submit.adapter,
        )

    def next_row(self, num_tokens: int) -> BatchRow:
        end = self.num_computed + num_tokens
        return BatchRow(
            self.slot,
            self.num_computed,
            num_tokens,
            samples=end == self.num_tokens,
            prompt_logprobs=(
                self.num_prompt_logprobs_sent is not None
                and self.num_computed + 1 < self.num_prompt_tokens
            ),
        )

    def unsent_prompt_logprobs(
        self, row: BatchRow, entries: list[TokenLogprobs] | None
    ) -> tuple[list[TokenLogprobs], int]:
        """Those of a row's `entries` that have not been sent (after a preemption, positions may
        be computed and reported again), and the prompt position of the first."""
        sent = self.num_prompt_logprobs_sent
        if sent is None or not entries:
            return [], 0
        assert row.start <= sent, "a gap in the prompt's logprobs"
        entries = entries[sent - row.start :]
        self.num_prompt_logprobs_sent = sent + len(entries)
        return entries, sent + 1

    def take(
        self, row: BatchRow, result: RowResult, eos_token_ids: frozenset[int], steps: int = 1
    ) -> SequenceUpdate | None:
        """What a row's result says. A `finish` is for the scheduler to carry out; what a run has
        drawn behind it is dropped."""
        entries, entries_start = self.unsent_prompt_logprobs(row, result.prompt_logprobs)
        start = self.num_output_tokens
        if not row.samples:
            if not entries:
                return None
            return SequenceUpdate(
                self, start, prompt_logprobs=entries, prompt_logprobs_start=entries_start
            )
        assert len(result.ids) == steps, "a row that samples yields one id a step"
        self.num_placeholders -= steps
        ids, stop = self._draw(result.ids, eos_token_ids)
        cached_tokens = 0 if self.cached_tokens_told else self.cached_tokens
        self.cached_tokens_told = True
        return SequenceUpdate(
            self,
            start,
            ids,
            logprobs=result.logprobs and result.logprobs[: len(ids)],
            prompt_logprobs=entries or None,
            prompt_logprobs_start=entries_start,
            finish=stop.reason if stop else None,
            stop_token=stop.token if stop else None,
            cached_tokens=cached_tokens,
        )

    def _draw(self, ids: list[int], eos_token_ids: frozenset[int]) -> tuple[list[int], Stop | None]:
        """Take in new ids up to the one that ends the sequence, if one does."""
        stop, first = None, 0
        if len(ids) > 1 and self.never_stops:
            first = len(ids) - 1  # a run does not go beyond the limits
            self.token_ids += ids[:first]
        for place in range(first, len(ids)):
            last_id = ids[place]
            self.token_ids.append(last_id)
            stop = check_stop(
                self.sampling,
                eos_token_ids,
                last_id,
                self.num_output_tokens,
                self.max_total_tokens - len(self.token_ids),
                constrained=self.submit.constraint is not None,
                hands_over=self.hands_over,
            )
            if stop is not None:
                return ids[: place + 1], stop
        return ids, None

    def max_reusable_blocks(self, block_tokens: int) -> int:
        """How many leading blocks may come from the cache.

        The last known token is always computed, as its logits are wanted. Prompt logprobs that
        have not been reported yet need their positions computed, too.
        """
        limit = len(self.token_ids) - 1
        if self.num_prompt_logprobs_sent is not None:
            limit = min(limit, self.num_prompt_logprobs_sent)
        return limit // block_tokens


class SequenceUpdate(msgspec.Struct, frozen=True):
    """What a step (or a cancellation) changed for one sequence.

    `start` is the index of `ids[0]` among the output tokens, resumed ones counted. `finish` is set
    on the last update of the sequence and only there; with "error" comes `error`.
    `prompt_logprobs` are of the prompt positions from `prompt_logprobs_start` on.
    """

    sequence: Sequence
    start: int
    ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs_start: int = 0
    finish: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    error: ErrorInfo | None = None
