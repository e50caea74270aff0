"""The scheduler under everything at once, against a runner that models content."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.helpers.scheduling import EOS, Harness, submit, undisturbed_output

from penstock.engine.scheduler.sequence import Sequence, SequenceUpdate
from penstock.engine.scheduler.validation import DuplicateSubmit
from penstock.protocol.errors import InvalidRequest, Overloaded
from penstock.protocol.kv import split_keys
from penstock.protocol.request import SamplingParams, Submit

BLOCK_TOKENS = 4
SERVICES = ("a", "b")
# Few distinct prompts with long common prefixes: collisions are what we are after.
STEMS = [[7] * 40, [7] * 9 + [8] * 31, list(range(10, 50))]


class Account:
    """What we heard of one attempt of one sequence."""

    def __init__(self, request: Submit, expected: tuple[list[int], str]) -> None:
        self.request = request
        self.expected_ids, self.expected_finish = expected
        self.ids: list[int] = []
        self.prompt_logprob_positions: list[int] = []
        self.finish: str | None = None
        self.silenced = False  # replaced or dropped: must not be heard of again

    def hear(self, update: SequenceUpdate) -> None:
        assert not self.silenced, "an update for a sequence that is gone"
        assert self.finish is None, "an update after the terminal one"
        assert update.start == len(self.request.resumed_ids) + len(self.ids)
        if update.prompt_logprobs is not None:
            assert not self.ids, "prompt logprobs come before the first id"
            first = update.prompt_logprobs_start
            for position, entry in enumerate(update.prompt_logprobs, first):
                assert entry.token_id == self.request.prompt_ids[position]
                self.prompt_logprob_positions.append(position)
        self.ids += update.ids
        assert self.ids == self.expected_ids[: len(self.ids)], "differs from the undisturbed run"
        self.finish = update.finish
        if update.finish in ("stop", "length"):
            assert self.ids == self.expected_ids and update.finish == self.expected_finish
            assert (update.finish == "stop") == (update.stop_token == self.ids[-1] is not None)
            self._check_prompt_logprobs()
        assert (update.finish == "error") == (update.error is not None)

    def _check_prompt_logprobs(self) -> None:
        wanted = self.request.sampling.prompt_logprobs is not None
        positions = range(1, len(self.request.prompt_ids)) if wanted else ()
        if not self.request.resumed_ids:
            assert self.prompt_logprob_positions == list(positions)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 24),
        depth=st.integers(1, 3),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 40),
        max_chunk=st.none() | st.integers(1, 12),
        caching=st.booleans(),
        max_steps=st.sampled_from([1, 1, 3, 20]),
    )
    def start(
        self,
        num_blocks: int,
        depth: int,
        max_num_seqs: int,
        budget: int,
        max_chunk: int | None,
        caching: bool,
        max_steps: int,
    ) -> None:
        self.max_steps = max_steps
        self.harness = Harness(
            num_blocks,
            depth,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_chunk_tokens=max_chunk,
            max_model_len=60,
            block_tokens=BLOCK_TOKENS,
            max_waiting=6,
            enable_prefix_caching=caching,
        )
        self.scheduler = self.harness.scheduler
        self.accounts: dict[int, Account] = {}  # by arrival
        self.num_requests = 0
        self.paused: set[str] = set()
        self.known_keys: set[bytes] = set()

    # ---- what may happen ------------------------------------------------------------------

    @rule(
        service=st.sampled_from(SERVICES),
        stem=st.sampled_from(range(len(STEMS))),
        length=st.integers(1, 30),
        offline=st.booleans(),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "x"]),
        cached=st.booleans() | st.just(True),
        copies=st.integers(1, 3),
        max_tokens=st.integers(1, 40),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_id=st.none() | st.integers(3, 49),
        prompt_logprobs=st.booleans(),
    )
    def new_requests(
        self,
        service: str,
        stem: int,
        length: int,
        copies: int,
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        stop_id: int | None,
        prompt_logprobs: bool,
        **fields: object,
    ) -> None:
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=() if stop_id is None else (stop_id,),
            prompt_logprobs=0 if prompt_logprobs else None,
        )
        for _ in range(copies):
            self.num_requests += 1
            self._add(
                submit(
                    f"r{self.num_requests}",
                    STEMS[stem][:length],
                    block_tokens=BLOCK_TOKENS,
                    sampling=sampling,
                    service=service,
                    **fields,  # type: ignore[arg-type]
                )
            )

    def _add(self, request: Submit) -> None:
        key = (request.service, request.request_id)
        older = [s for s in self.scheduler.live() if s.key == key]
        try:
            self.scheduler.add(request)
        except Overloaded:
            waiting = self.scheduler.stats.waiting
            assert not older and sum(waiting.values()) >= self.harness.config.max_waiting
        except InvalidRequest:
            assert len(request.prompt_ids) + len(request.resumed_ids) >= min(
                self.scheduler.max_model_len, len(request.prompt_ids) + request.sampling.max_tokens
            )
        else:
            for seq in older:
                self.accounts[seq.arrival].silenced = True
            (seq,) = (s for s in self.scheduler.live() if s.key == key)
            expected = undisturbed_output(request, self.scheduler.max_model_len)
            self.accounts[seq.arrival] = Account(request, expected)

    @precondition(lambda self: self.scheduler.has_work())
    @rule(data=st.data(), migrate=st.booleans())
    def newer_attempt(self, data: st.DataObject, migrate: bool) -> None:
        """The service places the sequence again, from the start or from where it stands."""
        seq = self._any_live(data)
        request = seq.submit
        ids = self.accounts[seq.arrival].ids if migrate else []
        self._add(
            submit(
                request.request_id,
                request.prompt_ids,
                block_tokens=BLOCK_TOKENS,
                cached=bool(request.block_keys),
                sampling=request.sampling,
                resumed=[*request.resumed_ids, *ids],
                offline=request.request_class == "offline",
                service=request.service,
                attempt=request.attempt + 1,
                priority=request.priority,
                salt=request.cache_salt,
            )
        )

    @precondition(lambda self: self.scheduler.has_work())
    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        with pytest.raises(DuplicateSubmit):
            self.scheduler.add(self._any_live(data).submit)

    @precondition(lambda self: self.scheduler.has_work())
    @rule(data=st.data(), any_attempt=st.booleans())
    def cancel(self, data: st.DataObject, any_attempt: bool) -> None:
        seq = self._any_live(data)
        assert self.scheduler.cancel(seq.key, seq.attempt + 1) is None
        update = self.scheduler.cancel(seq.key, None if any_attempt else seq.attempt)
        assert update is not None and update.finish == "cancelled"
        self.accounts[seq.arrival].hear(update)
        assert self.scheduler.cancel(seq.key) is None

    @rule(service=st.sampled_from(SERVICES))
    def drop_service(self, service: str) -> None:
        dropped = self.scheduler.live(service)
        assert self.scheduler.drop_service(service) == len(dropped)
        for seq in dropped:
            self.accounts[seq.arrival].silenced = True
        self.paused.discard(service)

    @rule(service=st.sampled_from(SERVICES))
    def pause_or_resume(self, service: str) -> None:
        if service in self.paused:
            self.scheduler.resume(service)
        else:
            self.scheduler.pause(service)
        self.paused ^= {service}

    @rule()
    def reset_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    @precondition(lambda self: len(self.harness.in_flight) < self.harness.depth)
    @rule()
    def launch(self) -> None:
        self._launch()

    @precondition(lambda self: self.harness.in_flight)
    @rule()
    def land(self) -> None:
        self._hear(self.harness.land())

    @rule()
    def keep_going(self) -> None:
        for _ in range(8):
            while len(self.harness.in_flight) < self.harness.depth and self._launch():
                pass
            if self.harness.in_flight:
                self._hear(self.harness.land())

    def _launch(self) -> bool:
        preemptions = self.scheduler.stats.preemptions
        could_go_on = any(s.service not in self.paused for s in self.scheduler.live())
        batch = self.harness.launch(self.max_steps)
        if batch is None:
            assert self.harness.in_flight or not could_go_on, "stuck"
            return False
        slots = {s.slot: s for s in self.scheduler.live() if s.slot >= 0}
        assert not {slots[row.slot].service for row in batch.rows} & self.paused
        if self.scheduler.stats.preemptions == preemptions:
            self._check_classes(batch.num_tokens)
        return True

    @precondition(lambda self: self.harness.in_flight and self.harness.in_flight[-1].steps > 1)
    @rule(data=st.data())
    def shorten(self, data: st.DataObject) -> None:
        self.harness.shorten(data.draw(st.integers(1, self.harness.in_flight[-1].steps)))

    @precondition(lambda self: self.harness.in_flight)
    @rule()
    def step_fails(self) -> None:
        batch = self.harness.in_flight[0]
        updates = self.harness.land(fail=True)
        assert len(updates) <= len(batch.rows)
        assert all(u.finish == "error" and not u.ids for u in updates)
        self._hear(updates)

    @precondition(lambda self: self.harness.in_flight)
    @rule(data=st.data())
    def row_fails(self, data: st.DataObject) -> None:
        bad_row = data.draw(st.integers(0, len(self.harness.in_flight[0].rows) - 1))
        self._hear(self.harness.land(bad_row=bad_row))

    # ---- what must hold -------------------------------------------------------------------

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.scheduler.check()
        stats = self.scheduler.stats
        assert sum(stats.running.values()) <= self.harness.config.max_num_seqs
        assert stats.kv_blocks_used + stats.kv_blocks_cached <= stats.kv_blocks_total
        for change in self.scheduler.take_kv_changes():
            keys = set(split_keys(change.keys))
            if change.op == "stored":
                assert not keys & self.known_keys
                self.known_keys |= keys
            elif change.op == "removed":
                assert keys <= self.known_keys
                self.known_keys -= keys
            else:
                self.known_keys.clear()
        assert self.known_keys == set(self.scheduler.pool.keys())

    def _check_classes(self, num_tokens: int) -> None:
        """Offline work never runs while an online prompt in a slot has tokens to compute and
        there was budget for them."""
        slack = self.harness.config.max_num_batched_tokens - num_tokens
        if slack and self.harness.config.max_chunk_tokens is None:
            behind = [s for s in self.scheduler.live() if s.slot >= 0 and s.num_to_compute > 1]
            assert all(s.service in self.paused for s in behind)

    def _any_live(self, data: st.DataObject) -> Sequence:
        return data.draw(st.sampled_from(self.scheduler.live()))

    def _hear(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self.accounts[update.sequence.arrival].hear(update)

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        for service in SERVICES:
            self.scheduler.resume(service)
        before = len(self.harness.updates)
        self.harness.run()
        self._hear(self.harness.updates[before:])
        self.everything_is_accounted_for()
        for account in self.accounts.values():
            assert account.silenced or account.finish is not None, "a sequence was lost"
        assert self.scheduler.stats.kv_blocks_used == 0
        assert not self.scheduler.live() and self.scheduler.schedule() is None


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_model_stops_by_itself_now_and_then() -> None:
    """Otherwise the machine above would never see a surplus row."""
    ends = [undisturbed_output(submit(f"r{i}", 5, ignore_eos=False), 60)[1] for i in range(40)]
    assert {"stop", "length"} == set(ends)
    assert EOS not in range(3, 50)
