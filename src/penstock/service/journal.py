"""The journal: all that is needed to resume a sequence on any instance, from where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES, block_keys, next_key, root_key
from penstock.protocol.request import Constraint, RequestClass, SamplingParams
from penstock.protocol.tokens import PromptLogprobs, TokenLogprobs, TokenRow
from penstock.service.explain import Record
from penstock.service.generation import GenerationSpec
from penstock.service.policies.routing import Decision


@dataclass(frozen=True, slots=True)
class Reservation:
    """Where a sequence whose prompt is computed elsewhere is to decode: its blocks go there while
    they are made (`attempt` is that of the prefill)."""

    instance: str
    incarnation: int
    epoch: int
    attempt: int


@dataclass(slots=True, eq=False)
class Entry:
    """One live sequence (one choice of a request)."""

    key: str
    request_id: str
    choice: int
    prompt_ids: list[int]
    sampling: SamplingParams
    constraint: Constraint | None
    request_class: RequestClass
    priority: int
    cache_salt: str
    accepted_s: float
    record: Record
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    deadline_s: float | None = None
    #: Output tokens so far. Those already handed out never change.
    emitted: list[int] = field(default_factory=list)
    attempt: int = 0
    instance: str | None = None
    #: Tokens that count as queued on the instance until its first token comes.
    queued_tokens: int = 0
    submitted_s: float = 0.0
    progress_s: float = 0.0
    #: When a snapshot last said that it lives where we think.
    confirmed_s: float = 0.0
    #: Placements lost, and steps that raised, since the last token.
    moves: int = 0
    failed_steps: int = 0
    #: Since when the sequence has had no instance; None while it has one.
    homeless_since_s: float | None = None
    #: Too late for its SLO wherever it goes, it waits behind those that are not; and has waited so
    #: long that it goes before them.
    deferred: bool = False
    overdue: bool = False
    #: How long steps with prompts may take where it decodes, for its TPOT.
    max_step_s: float | None = None
    prompt_logprobs_done: int = 1  # the next prompt position to report; 0 never has one
    cached_tokens: int | None = None
    #: Set while the prompt is computed on `instance` for another one to go on with.
    decode_on: Reservation | None = None
    #: Whose blocks the present placement began with, until its first token: it should not go yet.
    pulls_from: str | None = None
    #: What admission has decided on the way; the first placement follows it.
    foreseen: tuple[int | None, Decision] | None = None
    #: Why it was placed last, or waits to be.
    because: str = "new"
    #: When it lost its instance or was told to leave it, until the next token has come.
    interrupted_s: float | None = None
    _keys: bytearray = field(default_factory=bytearray)
    _keys_digest: str = ""
    _root: bytes = b""

    @classmethod
    def of(cls, spec: GenerationSpec, choice: int, now: float) -> Entry:
        return cls(
            key=f"{spec.request_id}/{choice}",
            request_id=spec.request_id,
            choice=choice,
            prompt_ids=spec.prompt_ids,
            sampling=spec.sampling,
            constraint=spec.constraint,
            request_class=spec.request_class,
            priority=spec.priority,
            cache_salt=spec.cache_salt,
            accepted_s=now,
            record=Record(
                request_id=spec.request_id,
                choice=choice,
                accepted_s=now,
                prompt_tokens=len(spec.prompt_ids),
                ttft_slo_s=spec.ttft_slo_s,
                tpot_slo_s=spec.tpot_slo_s,
            ),
            ttft_slo_s=spec.ttft_slo_s,
            tpot_slo_s=spec.tpot_slo_s,
            deadline_s=None if spec.total_budget_s is None else now + spec.total_budget_s,
            progress_s=now,
        )

    def interrupt(self, because: str, now: float) -> None:
        """It has lost its instance or leaves it; if that happens again before its next token, the
        first time counts."""
        self.because = because
        if self.interrupted_s is None:
            self.interrupted_s = now

    @property
    def news_s(self) -> float:
        """When we last knew that it lives."""
        return max(self.progress_s, self.submitted_s, self.confirmed_s)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs is not None and self.prompt_logprobs_done < len(
            self.prompt_ids
        )

    def is_next(self, row: TokenRow) -> bool:
        """Nothing is missing before the row, and nothing of it is known."""
        return row.start == len(self.emitted) and not (
            self.lacks_prompt_logprobs and not self.emitted
        )

    def take_prompt_logprobs(self, message: PromptLogprobs) -> list[TokenLogprobs]:
        """Those that are new. Behind a gap, which the first tokens will find, none are."""
        known = self.prompt_logprobs_done - message.start
        fresh = message.entries[known:] if known >= 0 else []
        self.prompt_logprobs_done += len(fresh)
        return fresh

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.emitted)

    def block_keys(self, model_digest: str) -> bytes:
        """Keys of all whole blocks of prompt and emitted tokens; only new blocks are hashed."""
        if not self._root or self._keys_digest != model_digest:
            self._root = root_key(model_digest, salt=self.cache_salt)
            self._keys = bytearray(block_keys(self._root, self.prompt_ids))
            self._keys_digest = model_digest
        done = len(self._keys) // KEY_BYTES
        if (done + 1) * BLOCK_TOKENS <= self.num_tokens:
            ids = self.prompt_ids + self.emitted
            parent = bytes(self._keys[-KEY_BYTES:]) or self._root
            for start in range(done * BLOCK_TOKENS, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
                parent = next_key(parent, ids[start : start + BLOCK_TOKENS])
                self._keys += parent
        return bytes(self._keys)


class Journal:
    """Live entries by key, in the order of acceptance. Bounded by admission."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._by_request: dict[str, dict[int, Entry]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def of_request(self, request_id: str) -> list[Entry]:
        return list(self._by_request.get(request_id, {}).values())

    def add(self, entry: Entry) -> None:
        assert entry.key not in self._entries
        self._entries[entry.key] = entry
        self._by_request.setdefault(entry.request_id, {})[entry.choice] = entry

    def remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        siblings = self._by_request[entry.request_id]
        del siblings[entry.choice]
        if not siblings:
            del self._by_request[entry.request_id]
