"""Runs of steps against single steps, and what is foreseen against what comes.

Twins are two schedulers that are told the same. One makes runs; the other makes as many single
steps, and after each run the two have to agree. With batches in overlap nobody is preempted by who
comes in: what is behind a run then waits for it, which is `InstanceCore`'s part.

A run takes all of its blocks when it begins, and so may evict what single steps go on keeping: for
steps that it is then not to have, or where two rows that compute the same give one copy back on the
way. Whoever would have begun with what was evicted computes it again. The cache is then what it
would be without some of its oldest blocks, and the twin is made to lose the same ones. (In overlap
a run in flight has not named what as many single steps have, which lasts when its sequence is
cancelled. Where that shows, both lose what nobody holds.)
"""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.helpers.scheduling import Harness, submit

from penstock.engine.scheduler.batch import Batch
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.sequence import Sequence, State
from penstock.protocol.request import SamplingParams

BLOCK_TOKENS = 4
SERVICES = ("a", "b")
STEMS = [[7] * 40, [7] * 9 + [8] * 31]


def harness(num_blocks: int, depth: int, max_num_seqs: int, budget: int, caching: bool) -> Harness:
    return Harness(
        num_blocks,
        depth,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=60,
        block_tokens=BLOCK_TOKENS,
        max_waiting=1000,
        enable_prefix_caching=caching,
    )


def place(scheduler: Scheduler, seq: Sequence) -> tuple[object, ...]:
    return seq.key, seq.state, seq.slot, seq.num_computed, seq.num_tokens, len(seq.blocks)


def cached(scheduler: Scheduler) -> list[bytes | None]:
    """The keys of what nobody holds, first the one to be evicted first."""
    pool = scheduler.pool
    return [pool.key_of(block) for block in pool._reusable.in_order()]


def evict(scheduler: Scheduler, count: int) -> None:
    """So many of them."""
    if count:
        pool = scheduler.pool
        pool.release(pool.allocate_many(pool.num_free + count))


class Twins(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 30),
        depth=st.integers(1, 2),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 40),
        caching=st.booleans(),
        max_steps=st.integers(2, 25),
    )
    def start(
        self,
        num_blocks: int,
        depth: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        max_steps: int,
    ) -> None:
        self.begin(num_blocks, depth, max_num_seqs, budget, caching, max_steps)

    def begin(
        self,
        num_blocks: int,
        depth: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        max_steps: int,
    ) -> None:
        self.single = harness(num_blocks, depth, max_num_seqs, budget, caching)
        self.runs = harness(num_blocks, depth, max_num_seqs, budget, caching)
        self.depth, self.max_steps = depth, max_steps
        self.num_requests = 0
        self.paused: set[str] = set()
        self.cancelled: set[str] = set()

    # ---- what both are told ---------------------------------------------------------------

    @rule(
        prompt=st.integers(1, 30),
        stem=st.none() | st.sampled_from(range(len(STEMS))),
        max_tokens=st.integers(1, 30),
        offline=st.booleans(),
        service=st.sampled_from(SERVICES),
        copies=st.integers(1, 3),
    )
    def add(
        self,
        prompt: int,
        stem: int | None,
        max_tokens: int,
        offline: bool,
        service: str,
        copies: int,
    ) -> None:
        for _ in range(copies):
            self.num_requests += 1
            limit = self.runs.scheduler.max_model_len
            request = submit(
                f"r{self.num_requests}",
                min(prompt, limit - 1) if stem is None else STEMS[stem][: min(prompt, limit - 1)],
                block_tokens=BLOCK_TOKENS,
                sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                offline=offline and self.depth == 1,
                service=service,
            )
            for one in (self.single, self.runs):
                one.scheduler.add(request)

    @precondition(lambda self: self.runs.scheduler.has_work())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        keys = [s.key for s in self.runs.scheduler.live()]
        key = data.draw(st.sampled_from(keys))
        for one in (self.single, self.runs):
            assert one.scheduler.cancel(key) is not None
        self.cancelled.add(key[1])
        if self.depth > 1:
            self._evict_alike(False)  # before anybody looks for what only one of them has

    @precondition(lambda self: self.depth == 1)
    @rule(service=st.sampled_from(SERVICES))
    def pause_or_resume(self, service: str) -> None:
        for one in (self.single, self.runs):
            (one.scheduler.resume if service in self.paused else one.scheduler.pause)(service)
        self.paused ^= {service}

    # ---- a run, and the same in single steps ----------------------------------------------

    @rule(data=st.data(), times=st.integers(1, 6))
    def advance(self, data: st.DataObject, times: int) -> None:
        for _ in range(times):
            steps, was_run = self._run(data)
            for step in range(steps):
                batch = self.single.launch()
                assert batch is not None
                if len(self.single.in_flight) >= self.depth or step < steps - 1:
                    self.single.land()
            if not steps and self.single.in_flight:
                assert self.single.launch() is None
                self.single.land()
            self._evict_alike(was_run)
            self._agree()

    def _evict_alike(self, was_run: bool) -> None:
        """Let single steps lose what the run has evicted."""
        ours, theirs = (cached(one.scheduler) for one in (self.runs, self.single))
        if self.depth == 1:
            num_ahead = len(theirs) - len(ours)
            assert theirs[num_ahead:] == ours and (was_run or not num_ahead)
            evict(self.single.scheduler, num_ahead)
        elif ours != theirs:
            evict(self.runs.scheduler, len(ours))
            evict(self.single.scheduler, len(theirs))

    def _run(self, data: st.DataObject) -> tuple[int, bool]:
        """How many steps it was, and whether more than one had been launched."""
        changes = self.runs.scheduler.num_changes
        batch = self.runs.launch(self.max_steps)
        if batch is None:
            if self.runs.in_flight:
                self.runs.land()
            return 0, False
        steps = batch.steps
        if steps > 1 and data.draw(st.booleans()):
            steps = data.draw(st.integers(1, steps))
            self.runs.shorten(steps)
        if len(self.runs.in_flight) >= self.depth:
            self.runs.land()
        if self.runs.in_flight and self.runs.scheduler.num_changes != changes:
            steps = 1
            self.runs.shorten(1)
        return steps, batch.steps > 1

    def _agree(self) -> None:
        ours, theirs = self.runs.scheduler, self.single.scheduler
        assert [place(ours, s) for s in ours.live()] == [place(theirs, s) for s in theirs.live()]
        waiting = [[s.key for s in one.next_waiting(100)] for one in (ours, theirs)]
        assert waiting[0] == waiting[1]
        if not self.runs.in_flight:
            assert ours.pool.num_available == theirs.pool.num_available
            assert ours.pool.num_held == theirs.pool.num_held
            keyed = [[s.num_keyed_blocks for s in one.live()] for one in (ours, theirs)]
            assert keyed[0] == keyed[1]
        assert ours.stats.preemptions == theirs.stats.preemptions
        assert ours.stats.scheduled_tokens == theirs.stats.scheduled_tokens

    def teardown(self) -> None:
        if not hasattr(self, "runs"):
            return
        for one in (self.single, self.runs):
            for service in SERVICES:
                one.scheduler.resume(service)
            one.run()
        for number in range(1, self.num_requests + 1):
            name = f"r{number}"
            if name not in self.cancelled:  # else what was in flight is lost
                assert self.runs.output(name) == self.single.output(name)
                assert self.runs.finish(name) == self.single.finish(name) == "length"
        ends = [[u.sequence.key for u in o.updates if u.finish] for o in (self.runs, self.single)]
        assert ends[0] == ends[1], "they end in another order"


TestTwins = Twins.TestCase
TestTwins.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class TwinsInOverlap(Twins):
    """Of two batches in flight alone. One history in some hundreds has what is rare: somebody who
    comes while a run is computed, and is let in or not by the last block."""

    @initialize(
        num_blocks=st.integers(6, 30),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 40),
        max_steps=st.integers(2, 25),
    )
    def start(self, num_blocks: int, max_num_seqs: int, budget: int, max_steps: int) -> None:  # type: ignore[override]
        self.begin(num_blocks, 2, max_num_seqs, budget, True, max_steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestTwinsInOverlap(TwinsInOverlap.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(TestTwins.settings, max_examples=3000)


def test_copies_that_would_be_given_back_are_not_kept_through_a_run() -> None:
    """Three that compute the same took blocks of their own for all steps of a run, so somebody who
    came in the middle of it waited for room that single steps had."""
    single, runs = (harness(21, 2, 5, 19, caching=True) for _ in range(2))

    def add(prompt: list[int], max_tokens: int, *names: str) -> None:
        for name in names:
            request = submit(name, prompt, block_tokens=BLOCK_TOKENS, max_tokens=max_tokens)
            for one in (single, runs):
                one.scheduler.add(request)

    def advance() -> None:
        batch = runs.launch(14)
        assert batch is not None
        if len(runs.in_flight) == runs.depth:
            runs.land()
        for _ in range(batch.steps):
            assert single.step() is not None

    add([7] * 16, 27, "r1", "r2", "r3")
    while single.scheduler.stats.running_tokens < 95:
        advance()
    add(list(range(100, 130)), 4, "r4")
    advance()
    states = [[place(one.scheduler, s) for s in one.scheduler.live()] for one in (single, runs)]
    assert states[0] == states[1]
    assert all(s.state is State.RUNNING for s in runs.scheduler.live())


# ---- what is foreseen ---------------------------------------------------------------------------


def only_decodes(batch: Batch | None, drawn: dict[int, int]) -> bool:
    """Does every row go on from the token that was drawn last, and does nobody come or go?"""
    if batch is None or batch.admitted or batch.freed_slots:
        return False
    rows = {row.slot: row.start for row in batch.rows if row.num_tokens == 1 and row.samples}
    return len(rows) == len(batch.rows) and all(drawn.get(s) == at for s, at in rows.items())


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    num_blocks=st.integers(8, 40),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    limit=st.integers(1, 30),
    requests=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 30), st.booleans(), st.integers(0, 20)),
        min_size=1,
        max_size=8,
    ),
    caching=st.booleans(),
)
def test_what_is_foreseen_is_what_comes(
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    limit: int,
    requests: list[tuple[int, int, bool, int]],
    caching: bool,
) -> None:
    """Of sequences that share nothing, in every state between two steps: so many steps are decode
    alone, by the same rows, and the next one is not, or it is the first after an end."""
    h = harness(num_blocks, 1, max_num_seqs, budget, caching)
    for number, (prompt, max_tokens, offline, _) in enumerate(requests):
        request = submit(
            f"r{number}", prompt, block_tokens=BLOCK_TOKENS, max_tokens=max_tokens, offline=offline
        )
        h.scheduler.add(request)
    for _ in range(1000):  # of a token each, if the budget is that small
        if not h.scheduler.has_work():
            return
        _compare(h, limit)
        h.launch()
        if h.in_flight:
            h.land()
    raise AssertionError("the scheduler does not come to an end")


def _compare(h: Harness, limit: int) -> None:
    foreseen = h.scheduler.stable_steps(limit)
    live = h.scheduler.live()
    trial = deepcopy(h)
    drawn = {
        s.slot: s.num_computed
        for s in live
        if s.slot >= 0 and s.num_output_tokens and s.num_to_compute == 1
    }
    first: list[int] | None = None
    for step in range(limit):
        ends = [u for u in trial.updates if u.finish][len([u for u in h.updates if u.finish]) :]
        batch = trial.launch()
        slots = None if batch is None else [row.slot for row in batch.rows]
        first = slots if first is None else first
        alike = not ends and only_decodes(batch, drawn) and slots == first
        # A slot that was freed before is only mentioned in the first batch after.
        assert alike == (step < foreseen) or (step == 0 and batch and batch.freed_slots), (
            f"step {step} of {foreseen}"
        )
        if step >= foreseen or batch is None:
            return
        trial.land()
        for slot in slots or ():
            drawn[slot] = drawn.get(slot, 0) + 1


def test_a_run_ends_a_sequence_where_it_draws_a_stop_token() -> None:
    """And what was drawn behind it is dropped, with whatever else had been in flight."""
    h = Harness(64, depth=2)
    request = submit("r", 6, max_tokens=200, ignore_eos=False)
    h.scheduler.add(request)
    while h.scheduler.has_work() or h.in_flight:
        h.launch(max_steps=16)
        if len(h.in_flight) == 2 or not h.scheduler.has_work():
            h.land()
    single = Harness(64, depth=1)
    single.scheduler.add(request)
    single.run()
    assert h.output("r") == single.output("r")
    assert h.finish("r") == single.finish("r") == "stop"
    assert h.scheduler.pool.num_held == 0


def test_what_would_not_have_begun_is_not_told() -> None:
    h = Harness(64)
    h.scheduler.add(submit("r", 20, max_tokens=100))
    h.step()
    h.step()
    before = h.scheduler.stats
    h.launch(max_steps=40)
    assert h.scheduler.stats.running_tokens == before.running_tokens + 40
    seen = h.scheduler.stats_without(39)
    assert seen.running_tokens == before.running_tokens + 1
    assert seen.decode_context_tokens == before.decode_context_tokens + 1
    assert seen.kv_blocks_used == before.kv_blocks_used
