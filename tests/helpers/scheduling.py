"""A runner that models content: it knows what each KV position of each block was written for.

Every token id and every KV position depends on the whole prefix before it, through a hash. A row
that reads a position holding anything but the KV of exactly its own prefix is caught, whatever
sharing, freeing or remapping went wrong before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from msgspec.structs import replace

from penstock.engine.scheduler.batch import Batch, BatchRow, RowResult, StepResult
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.sequence import SequenceUpdate
from penstock.protocol.errors import EngineFailed, ErrorInfo
from penstock.protocol.kv import block_keys, root_key
from penstock.protocol.request import SamplingParams, Submit
from penstock.protocol.tokens import TokenLogprobs

MODEL = "test-model"
EOS = 2
VOCAB_SIZE = 50
POISON = -1


def extend(prefix: int, token_id: int) -> int:
    """The hash of a prefix with one more token. Hashes of tuples of ints do not vary by run."""
    return hash((prefix, token_id))


def next_id(prefix: int) -> int:
    """The model: a function of the prefix alone. One token in 25 is EOS."""
    return 3 + prefix % (VOCAB_SIZE - 3) if prefix % 25 else EOS


def submit(
    request_id: str = "r",
    prompt: Sequence[int] | int = 8,
    *,
    block_tokens: int = 16,
    cached: bool = True,
    max_tokens: int = 16,
    ignore_eos: bool = True,
    sampling: SamplingParams | None = None,
    resumed: Sequence[int] = (),
    offline: bool = False,
    salt: str = "",
    **fields: object,
) -> Submit:
    """A Submit with defaults. An int for `prompt` asks for that many tokens nobody else has."""
    if isinstance(prompt, int):
        first = crc32(request_id.encode()) % 40_000 * 100_000
        prompt = range(first, first + prompt)
    ids = [*prompt, *resumed]
    known: dict[str, object] = {"attempt": 0, "service": "s", "service_incarnation": 1}
    return Submit(
        request_id=request_id,
        prompt_ids=list(prompt),
        resumed_ids=list(resumed),
        block_keys=block_keys(root_key(MODEL, salt=salt), ids, block_tokens) if cached else b"",
        cache_salt=salt,
        sampling=sampling or SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
        request_class="offline" if offline else "online",
        **{**known, **fields},  # type: ignore[arg-type]
    )


def undisturbed_output(request: Submit, max_len: int) -> tuple[list[int], str]:
    """What the sequence must produce (after `resumed_ids`), and how it ends."""
    prefix = 0
    for token_id in request.prompt_ids + request.resumed_ids:
        prefix = extend(prefix, token_id)
    sampling = request.sampling
    num_output = len(request.resumed_ids)
    limit = min(sampling.max_tokens, max_len - len(request.prompt_ids))
    ids: list[int] = []
    while True:
        ids.append(next_id(prefix))
        prefix = extend(prefix, ids[-1])
        num_output += 1
        stops = (not sampling.ignore_eos and ids[-1] == EOS) or ids[-1] in sampling.stop_token_ids
        if stops and num_output >= sampling.min_tokens:
            return ids, "stop"
        if num_output >= limit:
            return ids, "length"


@dataclass
class _Slot:
    ids: list[int]
    num_prompt_tokens: int
    blocks: dict[int, int] = field(default_factory=dict)

    def prefix(self, num_tokens: int) -> int:
        prefix = 0
        for token_id in self.ids[:num_tokens]:
            prefix = extend(prefix, token_id)
        return prefix


class ContentRunner:
    """Executes batches in order, exactly as the contract of `batch.py` says."""

    def __init__(self, num_blocks: int, block_tokens: int, num_windows: int = 0) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        num_ids = num_blocks + num_windows
        self.kv: list[list[int | None]] = [[None] * block_tokens for _ in range(num_ids)]
        self.slots: dict[int, _Slot] = {}

    def execute(
        self,
        batch: Batch,
        fail: bool = False,
        bad_row: int | None = None,
        stale: int | None = None,
    ) -> StepResult:
        """With `fail` the bookkeeping is done and the computing writes garbage. `stale`: this
        window shows something else by now."""
        for slot in batch.freed_slots:
            self.slots.pop(slot, None)
        for new in batch.admitted:
            assert new.slot not in self.slots, "a slot is admitted before it was freed"
            self.slots[new.slot] = _Slot(list(new.token_ids), new.num_prompt_tokens)
        for entry in batch.maps:
            self.slots[entry.slot].blocks[entry.index] = entry.block
        assert len({row.slot for row in batch.rows}) == len(batch.rows), "two rows for one slot"
        rows = [self._row(row, fail or i == bad_row) for i, row in enumerate(batch.rows)]
        for step in range(1, batch.steps):
            for i, row in enumerate(batch.rows):
                assert row.num_tokens == 1 and row.samples and not row.prompt_logprobs
                more = self._row(
                    BatchRow(row.slot, row.start + step, 1, True), fail or i == bad_row
                )
                rows[i] = replace(rows[i], ids=[*rows[i].ids, *more.ids])
        if fail:
            return StepResult(batch.step, [], error=EngineFailed("boom").info())
        if stale is not None:
            return self._with_stale(batch, rows, stale)
        return StepResult(batch.step, rows)

    def _with_stale(self, batch: Batch, rows: list[RowResult], window: int) -> StepResult:
        """Who has read the window must not be believed, now or later."""
        self.kv[window] = [POISON] * self.block_tokens
        found = []
        for row, result in zip(batch.rows, rows):
            slot = self.slots[row.slot]
            read = [slot.blocks[i] for i in range(-(-row.start // self.block_tokens))]
            if window in read:
                slot.ids[row.start + row.num_tokens :] = [POISON] if row.samples else []
                result = RowResult(row.slot, [POISON] * row.samples, stale=True)
            found.append(result)
        return StepResult(batch.step, found, stale_windows=(window,))

    def _row(self, row: BatchRow, bad: bool) -> RowResult:
        slot = self.slots[row.slot]
        assert row.num_tokens > 0
        end = row.start + row.num_tokens
        assert len(slot.ids) >= end, "the row's ids are not in the runner's table"
        poisoned = POISON in slot.ids[:end]  # the surplus row of a sequence whose step failed
        prefix = 0
        for position in range(end):
            prefix = extend(prefix, slot.ids[position])
            block, offset = divmod(position, self.block_tokens)
            cell = self.kv[slot.blocks[block]]
            if position >= row.start:
                assert slot.blocks[block] < self.num_blocks, "a row writes to a window"
                cell[offset] = POISON if bad or poisoned else prefix
            elif cell[offset] == POISON:
                poisoned = True
            else:
                assert poisoned or cell[offset] == prefix, "the row reads somebody else's KV"
        token_id = POISON if bad or poisoned else next_id(prefix)
        if row.samples:
            assert end >= len(slot.ids), "a row samples in the middle of known ids"
            slot.ids[end:] = [token_id]
        error = ErrorInfo("engine_failed", "bad row") if bad else None
        return RowResult(
            row.slot,
            [token_id] if row.samples else [],
            prompt_logprobs=self._prompt_logprobs(slot, row) if row.prompt_logprobs else None,
            error=error,
        )

    @staticmethod
    def _prompt_logprobs(slot: _Slot, row: BatchRow) -> list[TokenLogprobs]:
        end = min(row.start + row.num_tokens + 1, slot.num_prompt_tokens)
        return [TokenLogprobs(slot.ids[p], float(-p), 1, [], []) for p in range(row.start + 1, end)]


class Harness:
    """A scheduler and its runner, with up to `depth` batches in flight."""

    def __init__(
        self, num_blocks: int = 64, depth: int = 1, num_windows: int = 0, **config: object
    ) -> None:
        self.config = SchedulerConfig(eos_token_ids=(EOS,), **config)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.config, num_blocks, num_windows)
        self.runner = ContentRunner(num_blocks, self.config.block_tokens, num_windows)
        self.depth = depth
        self.in_flight: deque[Batch] = deque()
        self.updates: list[SequenceUpdate] = []

    def launch(self, max_steps: int = 1) -> Batch | None:
        batch = self.scheduler.schedule(max_steps)
        if batch is not None:
            assert 1 <= batch.steps <= max_steps
            assert batch.rows and batch.num_tokens <= self.config.max_num_batched_tokens
            self.in_flight.append(batch)
        return batch

    def shorten(self, steps: int) -> None:
        """The batch launched last will have only so many steps."""
        last = self.in_flight.pop()
        self.scheduler.shorten(last.step, steps)
        self.in_flight.append(replace(last, steps=steps))
        self.scheduler.check()

    def land(
        self, fail: bool = False, bad_row: int | None = None, stale: int | None = None
    ) -> list[SequenceUpdate]:
        batch = self.in_flight.popleft()
        updates = self.scheduler.apply(self.runner.execute(batch, fail, bad_row, stale))
        self.updates += updates
        self.scheduler.check()
        return updates

    def step(self) -> Batch | None:
        """Launch one batch and, if that fills the pipeline, land the oldest."""
        batch = self.launch()
        if self.in_flight and (batch is None or len(self.in_flight) >= self.depth):
            self.land()
        return batch

    def run(
        self, max_steps: int = 10_000, until: Callable[[], bool] = lambda: False
    ) -> list[Batch]:
        """Step until everything has ended; returns the batches."""
        batches = []
        for _ in range(max_steps):
            if until() or not (self.scheduler.has_work() or self.in_flight):
                return batches
            batch = self.step()
            if batch is not None:
                batches.append(batch)
        raise AssertionError("the scheduler does not come to an end")

    def output(self, request_id: str) -> list[int]:
        ids: list[int] = []
        for update in self.updates:
            if update.sequence.key[1] == request_id:
                ids += update.ids
        return ids

    def finish(self, request_id: str) -> str | None:
        ends = [u.finish for u in self.updates if u.sequence.key[1] == request_id and u.finish]
        assert len(ends) <= 1, "more than one terminal update"
        return ends[0] if ends else None
