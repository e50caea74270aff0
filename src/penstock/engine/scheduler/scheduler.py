"""One token budget, no phases.

Each sequence has tokens to compute and tokens computed, and every step lets the second catch up
with the first. A prompt in chunks, a prefix found in the cache, a return after preemption and a
migration from elsewhere differ only in where the two start.

Overlap: `schedule` may be called again before earlier batches have been answered. Ids that are
still to be sampled stand as placeholders; the runner fills them in by itself. A sequence that
certainly ends with the ids in flight gets no further row; one that may end (by a stop token) does,
and the surplus result is dropped.

Why blocks and slots can be freed at any moment, although steps in flight still touch them: the
runner executes batches strictly in order, and who gets the block next has rows only in batches
launched later. What a step in flight still writes is overwritten before it is read. The cache is
the exception, since a cached block is read as it is. Hence only *confirmed* KV is given a key
(whole blocks whose every position was written by a step whose result is in), and a sequence never
writes below its confirmed positions, so no step in flight writes to a block that has a key.

A failed step ends every sequence that had a row in it; its KV was never given a key. Its
bookkeeping (freed slots, admissions, maps) must have been done all the same, since rows of the next
batch may stand on it already.

Blocks that come from elsewhere are filled by other threads, which know nothing of that order. So
whoever lets them write to a block that has just been taken (or gives back a window) waits until the
steps in flight have been answered (`fence`, `passed`).

A *stale* row has read a window that its owner has taken back. Its sequence loses its blocks, and
whatever else it has in flight counts for nothing; it starts again with the tokens it had.
"""

from __future__ import annotations

from collections import deque

from penstock.engine.scheduler.batch import Batch, BatchRow, BlockMap, RowResult, StepResult
from penstock.engine.scheduler.block_pool import BlockPool, Generations, Holders
from penstock.engine.scheduler.books import check_claims, check_sequences, stats_of
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.foresight import Foresight
from penstock.engine.scheduler.imports import Hold, Holds, WindowReturns
from penstock.engine.scheduler.naming import name_blocks
from penstock.engine.scheduler.pacing import UNPACED, Pace
from penstock.engine.scheduler.queue import Queues, WaitingQueue
from penstock.engine.scheduler.room import Room
from penstock.engine.scheduler.running import Running
from penstock.engine.scheduler.runs import shorten
from penstock.engine.scheduler.sequence import Key, Sequence, SequenceUpdate, State, sealed_keys
from penstock.engine.scheduler.step import Claims, InFlight, Plan, SchedulerStats, Totals
from penstock.engine.scheduler.validation import DuplicateSubmit, validate
from penstock.protocol.errors import EngineFailed, ErrorInfo, Overloaded
from penstock.protocol.kv import KvChange
from penstock.protocol.request import Submit


class Scheduler:
    """Decides what each step computes. Deterministic: no clock, no chance, no I/O."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_blocks: int,
        num_windows: int = 0,
        generations: Generations | None = None,
        holders: Holders | None = None,
    ) -> None:
        """`num_windows`: ids beyond `num_blocks` that stand for pages of peers. `generations` and
        `holders` (length `num_blocks`): where others can see them."""
        self._config = config
        self.pool = BlockPool(num_blocks, num_windows, generations, holders)
        #: No sequence may outgrow the pool, so whoever runs alone can always go on.
        self.max_model_len = min(config.max_model_len, num_blocks * config.block_tokens)
        self._eos = frozenset(config.eos_token_ids)
        self._live: dict[Key, Sequence] = {}
        self._queues = Queues()
        #: Sequences that the batch made last has let in for the first time.
        self.newcomers: list[Sequence] = []
        self._paused: set[str] = set()  # only asked, never iterated
        self.claims = Claims()
        self._running = Running(self.pool, self.claims, config.max_num_seqs, config.block_tokens)
        #: Blocks held by no sequence; kept by `transfer/exchange.py`.
        self.holds = Holds(self.pool, self.claims)
        #: What sequences with windows had when they ended: the cache does not keep it, and who goes
        #: on with one elsewhere may be about to ask for it. `transfer/exchange.py` lets go of it;
        #: without one nothing is left (None).
        self.left_behind: list[Hold] | None = None
        self._returns = WindowReturns(self.pool)
        #: Who fits.
        self.room = Room(
            self.pool, self.holds, self.claims, self._running, self._paused, config.block_tokens
        )
        self.foresight = Foresight(
            config.max_num_batched_tokens, self.pool, self.room,
            self._running, self._queues, self._paused, config.block_tokens,
        )  # fmt: skip
        #: Grows when something happens that was not foreseen: what `stable_steps` has said before
        #: holds no more.
        self.num_changes = 0
        #: How many prompt tokens those that decode can bear in a step.
        self.pace: Pace = UNPACED
        self._in_flight: deque[InFlight] = deque()
        self._arrivals = 0
        self._totals = Totals()

    # ---- sequences come and go ------------------------------------------------------------

    def add(self, submit: Submit, hands_over: bool = False) -> Sequence:
        """Queue a sequence; if it `hands_over`, it ends with its first new token.

        A newer attempt replaces an older one, of which nothing more is heard. Raises
        `ContextLengthExceeded` or `InvalidRequest` for what can never run here, `Overloaded` for a
        new answer when the queue is full (one that has begun goes on), `DuplicateSubmit` for an
        attempt that is not newer than the live one.
        """
        older = self._live.get((submit.service, submit.request_id))
        if older is not None and older.attempt >= submit.attempt:
            raise DuplicateSubmit(
                f"attempt {submit.attempt} of {submit.request_id} was submitted before"
            )
        validate(submit, self.max_model_len, self._config.block_tokens)
        if older is not None:
            self._finish(older)
        elif not submit.resumed_ids and self._queues.num_waiting >= self._config.max_waiting:
            raise Overloaded(f"{self._config.max_waiting} sequences are waiting already")
        caching = self._config.enable_prefix_caching
        seq = Sequence.of(submit, self._arrivals, self.max_model_len, caching, hands_over)
        self._arrivals += 1
        self._live[seq.key] = seq
        self._queues[seq.request_class].enter(seq)
        self.num_changes += 1
        return seq

    def keys_of(self, owner: Key, keys: list[bytes]) -> list[bytes]:
        """What blocks of the request `owner`, which moves between instances, are called here."""
        return keys if self._config.enable_prefix_caching else sealed_keys(owner, keys)

    def cancel(self, key: Key, attempt: int | None = None) -> SequenceUpdate | None:
        """End a sequence at once, wherever it stands; its results in flight will be ignored.

        Returns its terminal update, or None if it (this attempt of it) is not here.
        """
        seq = self._live.get(key)
        if seq is None or attempt not in (None, seq.attempt):
            return None
        self._finish(seq)
        return SequenceUpdate(seq, seq.num_output_tokens, finish="cancelled")

    def drop_service(self, service: str) -> int:
        """Free everything that belongs to `service`, without updates; returns how many ended."""
        sequences = self.live(service)
        for seq in sequences:
            self._finish(seq)
        self._paused.discard(service)
        return len(sequences)

    def pause(self, service: str) -> None:
        """Give the service's sequences no further rows. They keep what they have, but are the
        first to lose it when somebody needs it."""
        self._paused.add(service)
        self.num_changes += 1

    def resume(self, service: str) -> None:
        self._paused.discard(service)
        self.num_changes += 1

    def live(self, service: str | None = None) -> list[Sequence]:
        """Unfinished sequences (of one service), in order of arrival."""
        return [s for s in self._live.values() if service is None or s.service == service]

    def num_here(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        return len(self._running), self._queues.num_waiting

    def has_work(self) -> bool:
        """Is there any unfinished sequence, even if nothing can be scheduled right now?"""
        return bool(self._live)

    def _finish(self, seq: Sequence) -> None:
        queue = self._queues[seq.request_class]
        if seq.state is State.RUNNING:
            keyed = seq.blocks[: seq.num_keyed_blocks]
            fleeting = bool(keyed) and not self.pool.is_kept(keyed[-1])
            if seq.public and fleeting and self.left_behind is not None:
                keys = seq.keys[: len(keyed)]
                self.left_behind.append(self.holds.hold(keys, soft=True))
            self._running.let_go(seq, keep=seq.public)
        else:
            queue.take_out(seq)
            # A preempted sequence's private blocks stay in the LRU until they are evicted.
        queue.leave(seq)
        seq.state = State.FINISHED
        del self._live[seq.key]
        if seq.num_placeholders:  # it has rows to come
            self.num_changes += 1
        self.reconsider()

    # ---- the loop -------------------------------------------------------------------------

    def stable_steps(self, limit: int) -> int:
        """For how many of the next `limit` steps nothing but decode can change: all have the same
        rows, and nobody is let in, preempted, or ends before the last of them (unless by a stop
        token, which nobody can know). Holds until `num_changes` grows."""
        return self.foresight.stable_steps(limit)

    def reconsider(self) -> None:
        """Something has changed that may let in who waits."""
        if self._queues.num_waiting:
            self.num_changes += 1

    def schedule(self, max_steps: int = 1) -> Batch | None:
        """The next step, or None if there is nothing that can be computed now; or, of at most
        `max_steps` steps, those that are stable.

        Online before offline; in each class decodes first, so that nobody's next token waits
        behind a prompt, then prompts under way, then newcomers, as far as budget, slots and
        blocks go.
        """
        self.holds.starved = False
        if not self._live:
            return None
        # A run leaves blocks for the step behind it: who is preempted while it is in flight would
        # lose what it has computed.
        steps = max(1, self.foresight.stable_steps(max_steps, 1)) if max_steps > 1 else 1
        plan = Plan(self._config.max_num_batched_tokens)
        paced: list[Sequence] = []  # of this class or one before it
        for request_class, queue in self._queues.items():
            decodes, prompts = self._running.of_class(request_class, self._paused)
            for seq in decodes:
                self._continue(seq, plan)
            # Whoever's last ids are in flight waits for no step.
            paced += [seq for seq in decodes if seq in plan.tokens]
            if paced and (prompts or len(queue)):
                plan.room = min(plan.room, self.pace.room(paced))
            for seq in prompts:
                self._continue(seq, plan)
            self._admit_waiting(queue, plan)
        return self._emit(plan, steps) if plan.tokens else None

    def _continue(self, seq: Sequence, plan: Plan) -> None:
        """Plan the next tokens of a running sequence. Where blocks are short, held ones are given
        up first, then the last in rank is preempted."""
        num_tokens = plan.chunk(seq.num_to_compute, self._config)
        if seq.state is not State.RUNNING or not num_tokens:
            return
        missing = self.room.num_blocks(seq.num_computed + num_tokens) - len(seq.blocks)
        while missing > 0 and missing > self.pool.num_available:
            if self.holds.make_room():
                continue
            victim = max(self._running, key=self.room.victim_rank)
            plan.drop(victim)
            self._send_back(victim)
            if victim is seq:
                return
        if missing > 0:
            self._running.cover(seq, seq.num_computed + num_tokens)
        plan.add(seq, num_tokens)

    def _admit_waiting(self, queue: WaitingQueue, plan: Plan) -> None:
        """Let newcomers in, best first, up to the first one that cannot come in yet: nobody
        overtakes it with a smaller request for ever."""
        if not len(queue):
            return
        admitted: list[Sequence] = []
        for seq in queue.in_order():
            if seq.service in self._paused:
                continue
            # After a preemption the last ids may still be in flight: it returns with them.
            if not plan.budget or seq.num_placeholders:
                break
            if self.room.awaits(seq):
                continue
            if plan.room <= 0 and not self.room.is_all_but_here(seq):
                break
            hits = self._find_room(seq, plan)
            if hits is None:
                break
            self._admit(seq, hits, queue)
            admitted.append(seq)
            num_tokens = plan.chunk(seq.num_to_compute, self._config)
            self._running.cover(seq, seq.num_computed + num_tokens)
            plan.add(seq, num_tokens)
        for seq in admitted:
            queue.take_out(seq)

    def _emit(self, plan: Plan, steps: int) -> Batch:
        """Turn the plan into a batch and remember it until its result comes."""
        number = self._totals.steps
        batch = Batch(number, rows=[], freed_slots=self._running.slots.take_freed(), steps=steps)
        flight = InFlight(number, steps=steps)
        self.newcomers = []
        for seq, num_tokens in plan.tokens.items():
            if seq.is_new:
                batch.admitted.append(seq.new_sequence())
                self.newcomers += [] if seq.num_preemptions else [seq]
                seq.is_new = False
            row = seq.next_row(num_tokens)
            batch.rows.append(row)
            flight.rows.append((seq, row, seq.run))
            if row.samples:
                seq.num_placeholders += steps
                self._queues[seq.request_class].charge(seq.flow, steps)
            seq.num_computed += num_tokens + steps - 1
            self._totals.scheduled_tokens += num_tokens + steps - 1
            if steps > 1:
                assert num_tokens == 1 and row.samples, "a run only decodes"
                self._running.cover(seq, seq.num_computed)
            if seq.stale_maps:
                batch.maps.extend([BlockMap(seq.slot, i, seq.blocks[i]) for i in seq.stale_maps])
                seq.stale_maps = []
        self._in_flight.append(flight)
        self._totals.steps += 1
        return batch

    def shorten(self, step: int, steps: int) -> None:
        """The run `step`, the batch launched last, will have only so many steps. What was set
        aside for the others is given back."""
        flight = self._in_flight[-1]
        assert flight.step == step and 1 <= steps <= flight.steps, "not a run that can be shortened"
        shorten(flight, steps, self.pool, self._queues, self._totals, self._config.block_tokens)

    # ---- room -----------------------------------------------------------------------------

    def _find_room(self, seq: Sequence, plan: Plan) -> list[int] | None:
        """Make room for `seq`; returns the cached blocks it begins with, which it holds from now
        on, or None if it cannot come in. When nothing runs whose end could be waited for, blocks
        of nobody's are given up for it."""
        while (victims := self.room.victims_for(seq, hits := self.room.match(seq))) is None:
            if self._running:
                return None
            if not self.holds.make_room():
                self.holds.starved = True
                return None
        for block in hits:  # first: windows go with their last holder
            self.pool.share(block)
        for victim in victims:
            plan.drop(victim)
            self._send_back(victim)
        return hits

    def _send_back(self, seq: Sequence) -> None:
        """Take slot and blocks away. Confirmed whole blocks stay in the cache, so that the return
        is cheap while memory is not short; ids in flight still count."""
        self._running.let_go(seq, keep=True)
        seq.state = State.WAITING
        seq.num_preemptions += 1
        self._totals.preemptions += 1
        self._queues[seq.request_class].put_back(seq)

    def _admit(self, seq: Sequence, hits: list[int], queue: WaitingQueue) -> None:
        self._running.let_in(seq, hits)
        if seq.num_preemptions == 0:
            queue.chosen(seq.flow)
            queue.charge(seq.flow, seq.num_to_compute)
            seq.cached_tokens = min(seq.num_computed, seq.num_prompt_tokens)
            if seq.public:
                self._totals.prefix_hit_tokens += seq.cached_tokens
                self._totals.prefix_query_tokens += seq.num_prompt_tokens

    # ---- results --------------------------------------------------------------------------

    def apply(self, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the oldest batch in flight; says what changed for whom.

        A failed step (`result.error`) ends every sequence that had a row in it.
        """
        flight = self._in_flight.popleft()
        assert flight.step == result.step, "results come in the order of the batches"
        if result.error is not None:
            ended = [seq for seq, _, _ in flight.rows if seq.state is not State.FINISHED]
            info = EngineFailed(f"step {result.step} failed: {result.error.message}").info()
            return [self._end_with_error(seq, info) for seq in ended]
        assert len(result.rows) == len(flight.rows), "one result for each row"
        self._spoil(flight, result)
        updates = []
        for (seq, row, run), row_result in zip(flight.rows, result.rows):
            assert row_result.slot == row.slot, "row results stand in the order of the rows"
            if seq.state is not State.FINISHED:  # otherwise the row was surplus
                update = self._apply_row(seq, row, run, row_result, flight.steps)
                if update is not None:
                    updates.append(update)
        return updates

    def _apply_row(
        self, seq: Sequence, row: BatchRow, run: int, result: RowResult, steps: int
    ) -> SequenceUpdate | None:
        if run <= seq.spoilt_run:
            seq.num_placeholders -= steps * row.samples
            return None
        if result.error is not None:
            return self._end_with_error(seq, result.error)
        update = seq.take(row, result, self._eos, steps)
        if run == seq.run:
            num_drawn = len(update.ids) if update is not None else 0
            seq.num_confirmed = row.start + row.num_tokens + max(0, num_drawn - 1)
            name_blocks(seq, self.pool, self.claims, self._config.block_tokens)
        if update is not None and update.finish is not None:
            self._finish(seq)
        return update

    def _spoil(self, flight: InFlight, result: StepResult) -> None:
        """Stale rows count for nothing, nor does what has been built on them since; and nobody else
        is to read those windows."""
        if not result.stale_windows and not any([row.stale for row in result.rows]):
            return
        for (seq, _, run), row_result in zip(flight.rows, result.rows):
            if row_result.stale and seq.state is not State.FINISHED:
                seq.spoilt_run = max(seq.spoilt_run, run)
        gone = frozenset(result.stale_windows)
        for seq in list(self._running):
            if seq.spoilt_run == seq.run or not gone.isdisjoint(seq.blocks):
                seq.spoilt_run = seq.run
                self._send_back(seq)
        if gone:
            self.holds.distrust_holders(self.pool.forget_windows(result.stale_windows))

    def _end_with_error(self, seq: Sequence, info: ErrorInfo) -> SequenceUpdate:
        self._finish(seq)
        return SequenceUpdate(seq, seq.num_output_tokens, finish="error", error=info)

    # ---- blocks from elsewhere ------------------------------------------------------------

    def fence(self) -> int:
        """To be asked of `passed` later: have the steps in flight now been answered? Somebody waits
        for that, so a run should not go on."""
        self.num_changes += 1
        return self._totals.steps

    def passed(self, fence: int) -> bool:
        return self._totals.steps - len(self._in_flight) >= fence

    def next_waiting(self, count: int) -> list[Sequence]:
        """Who comes next, in order."""
        return self._queues.next(count, self._paused)

    def will_store(self, key: bytes, index: int) -> bool:
        """Is anybody here about to have `key` as its block `index`, running or waiting?"""
        return self.claims.owner(key) is not None or any(
            index < len(seq.keys) and seq.keys[index] == key for seq in self._queues.waiting()
        )

    def take_released_windows(self) -> list[int]:
        """Windows that no sequence, hold or step uses any more: back to their owner with them.
        They may stand for other pages from now on."""
        return self._returns.take(self._totals.steps, self.passed)

    # ---- looking in -----------------------------------------------------------------------

    @property
    def stats(self) -> SchedulerStats:
        return self.stats_without(0)

    def stats_without(self, num_steps: int) -> SchedulerStats:
        """As if the batch launched last had so many steps fewer: those of a run that nobody would
        have launched yet if it were single steps."""
        last = self._in_flight[-1] if num_steps else InFlight(-1)
        return stats_of(
            list(self._queues.waiting()), self._running, self.pool, self._totals,
            last, num_steps, self._config.block_tokens,
        )  # fmt: skip

    def take_kv_changes(self) -> list[KvChange]:
        """What was stored and removed since the last call, in order."""
        return self.pool.take_changes()

    def reset_prefix_cache(self) -> None:
        """Forget all cached KV (the weights have changed). Sequences that hold KV go on with it,
        but what builds on it is not named."""
        self.pool.clear_keys()
        self.claims.clear()
        self.holds.distrust()
        for seq in self._running:
            seq.trusted = False

    def check(self) -> None:
        """Assert the invariants: every block, slot and sequence is accounted for once."""
        self.pool.check(
            [*(seq.blocks for seq in self._running), *self.holds.holdings()],
            self._returns.waiting(),
        )
        self.holds.check()
        self._running.check()
        check_sequences(self._running, list(self._queues.waiting()), self.live(), self._in_flight)
        check_claims(self.claims)
