"""Scheduler and holds under everything at once, against a runner that models content: imports that
succeed, fail and hang, windows that are taken back, pins, stores, promises, preemption, cancels.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.helpers.scheduling import Harness, extend, submit, undisturbed_output

from penstock.engine.scheduler.imports import Hold, Import
from penstock.engine.scheduler.validation import DuplicateSubmit
from penstock.protocol.errors import InvalidRequest, Overloaded
from penstock.protocol.kv import block_keys, root_key, split_keys

BLOCK_TOKENS = 4
NUM_WINDOWS = 6
STEMS = [[7] * 40, [7] * 9 + [8] * 31, list(range(10, 50))]


class Job:
    """Blocks of an import that a data plane may fill once no step in flight touches them."""

    def __init__(self, imp: Import, ids: list[int], start: int, blocks: list[int], fence: int):
        self.imp, self.ids, self.start, self.blocks, self.fence = imp, ids, start, blocks, fence


class ImportsMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(8, 24), depth=st.integers(1, 3), budget=st.integers(4, 40))
    def start(self, num_blocks: int, depth: int, budget: int) -> None:
        self.harness = Harness(
            num_blocks,
            depth,
            num_windows=NUM_WINDOWS,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            max_model_len=60,
            block_tokens=BLOCK_TOKENS,
            max_waiting=8,
        )
        self.scheduler = self.harness.scheduler
        self.pool, self.holds = self.scheduler.pool, self.scheduler.holds
        self.expected: dict[str, tuple[list[int], str]] = {}
        self.imports: list[tuple[Import, list[int]]] = []
        self.jobs: list[Job] = []
        self.pins: list[Hold] = []
        self.storing: dict[int, list[int | None]] = {}  # what their copies read
        self.known: set[bytes] = set()
        self.generations = [0] * num_blocks
        self.num_requests = 0

    def _ids(self, stem: int, num_blocks: int) -> tuple[list[int], list[bytes]]:
        ids = STEMS[stem][: num_blocks * BLOCK_TOKENS]
        return ids, split_keys(block_keys(root_key("model"), ids, BLOCK_TOKENS))

    # ---- sequences ------------------------------------------------------------------------

    @rule(
        stem=st.sampled_from(range(len(STEMS))),
        length=st.integers(1, 40),
        max_tokens=st.integers(1, 16),
        offline=st.booleans(),
        copies=st.integers(1, 2),
    )
    def new_requests(
        self, stem: int, length: int, max_tokens: int, offline: bool, copies: int
    ) -> None:
        for _ in range(copies):
            self.num_requests += 1
            request_id = f"r{self.num_requests}"
            request = submit(
                request_id, STEMS[stem][:length], block_tokens=BLOCK_TOKENS,
                max_tokens=max_tokens, offline=offline,
            )  # fmt: skip
            try:
                self.scheduler.add(request)
            except (Overloaded, InvalidRequest, DuplicateSubmit):
                continue
            self.expected[request_id] = undisturbed_output(request, self.scheduler.max_model_len)

    @precondition(lambda self: self.scheduler.has_work())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.scheduler.live()))
        self.scheduler.cancel(seq.key)
        self.expected.pop(seq.key[1])

    @rule(num_steps=st.sampled_from([1, 1, 4, 12]))
    def go_on(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.harness.step()

    @precondition(lambda self: len(self.harness.in_flight) < self.harness.depth)
    @rule()
    def launch(self) -> None:
        self.harness.launch()

    # ---- imports --------------------------------------------------------------------------

    @rule(stem=st.sampled_from(range(len(STEMS))), num_blocks=st.integers(1, 10))
    def begin_import(self, stem: int, num_blocks: int) -> None:
        ids, keys = self._ids(stem, num_blocks)
        imp = self.holds.begin_import(keys)
        if imp is not None:
            self.imports.append((imp, ids))

    @rule(
        stem=st.sampled_from(range(len(STEMS))),
        num_blocks=st.integers(1, 8),
        windows=st.booleans(),
        length=st.integers(1, 12),
    )
    def import_for_a_sequence(self, stem: int, num_blocks: int, windows: bool, length: int) -> None:
        """All in one go, as it mostly is, with somebody to use it."""
        ids, keys = self._ids(stem, num_blocks)
        imp = self.holds.begin_import(keys)
        self.new_requests(stem, len(ids) + length, 8, False, 2)
        if imp is None:
            return
        self.imports.append((imp, ids))
        num_missing, start = len(imp.keys) - len(imp.blocks), len(imp.blocks)
        room = self.scheduler.room.spare()
        taken = self.holds.take_room(imp, num_missing, windows, room)
        job = Job(imp, ids, start, taken, self.scheduler.fence())
        if taken:
            self.jobs.append(job)
        while not self.scheduler.passed(job.fence):
            self.harness.land()
        if taken:
            self._end_job(job, 99)
        kept = self.holds.hold(keys, soft=True)
        self._end_import(len(self.imports) - 1)
        self.harness.launch() if len(self.harness.in_flight) < self.harness.depth else None
        self.holds.release(kept)

    @precondition(lambda self: self.imports)
    @rule(data=st.data(), num_blocks=st.integers(1, 6), windows=st.booleans())
    def take_room(self, data: st.DataObject, num_blocks: int, windows: bool) -> None:
        imp, ids = data.draw(st.sampled_from(self.imports))
        num_blocks = min(num_blocks, len(imp.keys) - len(imp.blocks))
        if not imp.claiming or num_blocks <= 0:
            return
        start = len(imp.blocks)
        taken = self.holds.take_room(imp, num_blocks, windows, self.scheduler.room.spare())
        if taken:
            self.jobs.append(Job(imp, ids, start, taken, self.scheduler.fence()))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), fails=st.integers(0, 12))
    def job_ends(self, data: st.DataObject, fails: int) -> None:
        ready = [job for job in self.jobs if self.scheduler.passed(job.fence)]
        if ready:
            self._end_job(data.draw(st.sampled_from(ready)), fails)

    def _end_job(self, job: Job, fails: int) -> None:
        self.jobs.remove(job)
        ok = [i != fails for i in range(len(job.blocks))]
        for index, (block, good) in enumerate(zip(job.blocks, ok), job.start):
            self._fill(block, job.ids, index if good else None)
        self.holds.filled(job.imp, job.start, ok)

    def _fill(self, block: int, ids: list[int], index: int | None) -> None:
        prefix, cells = 0, []
        for token_id in ids[: ((index or 0) + 1) * BLOCK_TOKENS]:
            prefix = extend(prefix, token_id)
            cells.append(prefix)
        garbage: list[int | None] = [None] * BLOCK_TOKENS
        self.harness.runner.kv[block] = garbage if index is None else list(cells[-BLOCK_TOKENS:])

    @precondition(lambda self: self.imports)
    @rule(data=st.data())
    def end_import(self, data: st.DataObject) -> None:
        self._end_import(data.draw(st.integers(0, len(self.imports) - 1)))

    def _end_import(self, place: int) -> None:
        imp, _ = self.imports[place]
        self.holds.give_up(imp)
        if not imp.num_running:
            self.imports.pop(place)
            self.holds.release(imp)

    @rule(data=st.data())
    def pages_are_taken_back(self, data: st.DataObject) -> None:
        """The owner of some windows that are being read has moved on."""
        mapped = [b for s in self.scheduler.live() for b in s.blocks if b >= self.pool.num_blocks]
        if mapped and self.harness.in_flight:
            self.harness.land(stale=data.draw(st.sampled_from(sorted(set(mapped)))))

    # ---- holds, promises, stores ----------------------------------------------------------

    @rule(
        stem=st.sampled_from(range(len(STEMS))),
        num_blocks=st.integers(1, 10),
        kind=st.sampled_from(["pin", "brief", "soft", "hard"]),
    )
    def hold(self, stem: int, num_blocks: int, kind: str) -> None:
        _, keys = self._ids(stem, num_blocks)
        if kind in ("pin", "brief"):
            had_room = self.holds.has_room_for_pin(keys, besides=0)
            num_cached = len(self.pool.match(keys))
            pinned = self.holds.pin(keys, brief=kind == "brief")
            assert all(b < self.pool.num_blocks for b in pinned.blocks)
            behind = keys[len(pinned.blocks) : num_cached]
            is_window = bool(behind) and self.pool.is_window(self.pool.match(keys)[-len(behind)])
            assert self.holds.is_stuck(pinned) == bool(behind)
            assert not (had_room and behind and not is_window), "there was room for all of it"
        else:
            pinned = self.holds.hold(keys, kind == "soft")
        self.pins.append(pinned)

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), release=st.booleans())
    def release_or_extend(self, data: st.DataObject, release: bool) -> None:
        place = data.draw(st.integers(0, len(self.pins) - 1))
        if release:
            self.holds.release(self.pins.pop(place))
        elif not self.pins[place].released:
            self.holds.pin_more(self.pins[place])

    @rule(number=st.integers(1, 3), num_blocks=st.integers(0, 6))
    def promise(self, number: int, num_blocks: int) -> None:
        if num_blocks:
            self.holds.promise(("s", f"p{number}"), num_blocks)
        else:
            self.holds.withdraw(("s", f"p{number}"))

    @rule(num_blocks=st.integers(1, 6))
    def begin_store(self, num_blocks: int) -> None:
        oldest = self.pool.oldest(num_blocks)
        self.pool.begin_store(oldest)
        for block in oldest:
            self.storing[block] = list(self.harness.runner.kv[block])
            assert None not in self.storing[block]

    @precondition(lambda self: self.storing)
    @rule()
    def end_store(self) -> None:
        for block, cells in self.storing.items():
            assert self.harness.runner.kv[block] == cells, "it has changed while it was copied"
        self.pool.end_store(self.storing)
        self.storing = {}

    @rule()
    def reset_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    # ---- what must hold -------------------------------------------------------------------

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.scheduler.take_released_windows()
        self.scheduler.check()
        for change in self.scheduler.take_kv_changes():
            keys = set(split_keys(change.keys))
            if change.op == "stored":
                assert not keys & self.known
                self.known |= keys
            elif change.op == "removed":
                assert keys <= self.known
                self.known -= keys
            else:
                self.known.clear()
        assert self.known == set(self.scheduler.pool.keys())
        now = self.pool.generations.tolist()
        assert all(before <= after for before, after in zip(self.generations, now))
        self.generations = now

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        # What holds others' room ends by itself in the end; then everybody gets on.
        for job in list(self.jobs):
            while not self.scheduler.passed(job.fence):
                self.harness.land()
            self._end_job(job, 99)
        while self.imports:
            self._end_import(0)
        self.end_store() if self.storing else None
        for pinned in self.pins:
            self.holds.release(pinned)
        for number in (1, 2, 3):
            self.holds.withdraw(("s", f"p{number}"))
        self.harness.run()
        self.everything_is_accounted_for()
        for request_id, (ids, finish) in self.expected.items():
            assert self.harness.output(request_id) == ids
            assert self.harness.finish(request_id) == finish
        assert self.pool.num_held == 0 and self.pool.num_free_windows == NUM_WINDOWS
        assert not self.scheduler.claims.owners() and len(self.holds) == 0


TestImportsMachine = ImportsMachine.TestCase
TestImportsMachine.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
