"""What must hold in every storm.

`Witness` stands beside the cores: it sees each message before they act on it and what they did
then, and counts anew what they have counted. It knows their public state alone, and shares none of
their bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.engine.core import InstanceCore
from penstock.protocol.effects import Effect, Reply, Send
from penstock.protocol.instance import Assign, Assigned, Attach, Attached
from penstock.protocol.kv import BlocksReady, Fetch, Pull, Refused
from penstock.protocol.request import Cancel, Submit
from penstock.protocol.tokens import Tokens
from penstock.service.core import ServiceCore

#: Events in a row at one moment. (What a stopped process has missed comes all at once.)
_MOST_AT_ONCE = 5000
Act = Callable[[str, Any, float], list[Effect]]


class Broken(AssertionError):
    """An invariant does not hold."""


def hold(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


class Witness:
    """`beside(core)` for each core at its start; `look(core)` after each event that touched it."""

    def __init__(self, recount_every: int) -> None:
        self._recount_every = recount_every
        self._num_looks = 0
        self._now_s, self._stands_still = 0.0, 0
        self._cores: dict[str, InstanceCore | ServiceCore] = {}
        #: Of each instance: the incarnations of services that it has let in, and who runs there.
        self._attached: dict[tuple[str, str], int] = {}
        #: The greatest epoch that a service has known of one incarnation of an instance.
        self._epochs: dict[tuple[str, int, str, int], int] = {}

    # --- acting on messages --------------------------------------------------------------------

    def beside(self, name: str, core: InstanceCore | ServiceCore) -> None:
        self._cores[name] = core
        act = core.on_message
        if isinstance(core, InstanceCore):
            self._attached = {k: v for k, v in self._attached.items() if k[0] != name}
            seen = self._seen_by_instance(name, core, act)
        else:
            seen = self._seen_by_service(core, act)
        setattr(core, "on_message", seen)  # noqa: B010 (of this one object)

    def _seen_by_instance(self, name: str, core: InstanceCore, act: Act) -> Act:
        def on_message(peer: str, message: Any, now: float) -> list[Effect]:
            epoch, role, draining = core.epoch, core.role, core.draining
            key = (peer, getattr(message, "request_id", ""))
            before = self._live(core, key)
            effects = act(peer, message, now)
            after = self._live(core, key)
            match message:
                case Attach() if _sent(effects, Attached):
                    known = self._attached.get((name, peer), 0)
                    hold(message.incarnation >= known, f"{name} lets an older {peer} in")
                    self._attached[name, peer] = message.incarnation
                case Submit() if after is not None and after != before:
                    known = self._attached.get((name, peer), 0)
                    late = message.service_incarnation != known
                    hold(not late, f"{name} takes {key[1]} from an older incarnation of {peer}")
                    stale = any(s.instance == name and s.epoch < epoch for s in message.plan)
                    hold(not stale, f"{name} takes {key[1]} by a plan older than its role")
                    hold(not draining, f"{name} drains and takes {key[1]}")
                    hold(before is None or after > before, f"{name} goes back to attempt {after}")
                case Cancel() if before is not None and before > message.attempt:
                    hold(after == before, f"{name} cancels {key[1]} by the word of an old attempt")
                case Assign():
                    if message.epoch <= epoch:
                        same = (core.role, core.epoch) == (role, epoch)
                        hold(same, f"{name} takes a role from an older leader")
                    else:
                        hold(core.epoch == message.epoch, f"{name} does not take its epoch")
                case Fetch() if message.epoch < epoch:
                    hold(_sent(effects, Refused), f"{name} fetches by an older plan")
                case Pull() if message.owner_incarnation != core.card.incarnation:
                    offered = _sent(effects, BlocksReady)
                    hold(not offered, f"{name} offers the blocks of its predecessor")
            return effects

        return on_message

    @staticmethod
    def _live(core: InstanceCore, key: tuple[str, str]) -> int | None:
        """The attempt that is live there."""
        if not key[1]:
            return None
        return next((s.attempt for s in core.scheduler.live(key[0]) if s.key == key), None)

    def _seen_by_service(self, core: ServiceCore, act: Act) -> Act:
        def on_message(peer: str, message: Any, now: float) -> list[Effect]:
            instance = core.instances.get(peer)
            if instance is None:
                effects = act(peer, message, now)
                hold(not effects, f"{core.config.name} acts on a word of {peer}, which it left")
                return effects
            said = getattr(message, "incarnation", None)
            old = (
                said is not None
                and not isinstance(message, Attached | Assigned)
                and said != instance.incarnation
            )
            before = _state(core, peer) if old else None
            stale = _stale_rows(core, peer, message) if isinstance(message, Tokens) else {}
            effects = act(peer, message, now)
            if old:
                same = not effects and _state(core, peer) == before
                hold(same, f"{core.config.name} acts on a word of incarnation {said} of {peer}")
            for key, num_tokens in stale.items():
                entry = core.journal.get(key)
                if entry is not None:
                    hold(len(entry.emitted) == num_tokens, f"{key} grows by an old attempt")
            answered = {f"{e.request_id}/{e.event.choice}" for e in _of(effects, Reply)}
            for key in stale:
                hold(key not in answered, f"{key} is answered by an old attempt")
            self._epoch_grows(core, peer)
            return effects

        return on_message

    def _epoch_grows(self, core: ServiceCore, peer: str) -> None:
        instance = core.instances.get(peer)
        if instance is None or instance.card is None:
            return
        config = core.config
        key = (config.name, config.incarnation, peer, instance.incarnation)
        hold(
            instance.epoch >= self._epochs.get(key, 0),
            f"{config.name} goes back to an older epoch of {peer}",
        )
        self._epochs[key] = instance.epoch

    # --- counting anew -------------------------------------------------------------------------

    def look(self, name: str, now_s: float) -> None:
        """After each event, at `now_s` of the world."""
        self._stands_still = self._stands_still + 1 if now_s == self._now_s else 0
        self._now_s = now_s
        hold(self._stands_still < _MOST_AT_ONCE, f"{name} sets itself off for ever")
        core = self._cores.get(name)
        if core is None:
            return
        self._num_looks += 1
        if isinstance(core, ServiceCore):
            core.check()
        if self._num_looks % self._recount_every == 0:
            self.recount()

    def recount(self) -> None:
        for core in self._cores.values():
            if isinstance(core, ServiceCore):
                recount_service(core)
            else:
                recount_instance(core)


def recount_service(core: ServiceCore) -> None:
    core.check()
    keys = {entry.key for entry in core.journal}
    for instance in core.instances.values():
        hold(keys.issuperset(instance.entries), f"{instance.name} has what the journal has not")
        coming = [e.key for e in core.journal if _comes_to(e, instance.name)]
        hold(sorted(instance.coming) == sorted(coming), f"what is to come to {instance.name}")


def _comes_to(entry: Any, name: str) -> bool:
    return entry.decode_on is not None and entry.decode_on.instance == name


def recount_instance(core: InstanceCore) -> None:
    core.scheduler.check()
    core.exchange.check()
    stats, live = core.scheduler.stats, core.scheduler.live()
    counted = sum(stats.running.values()) + sum(stats.waiting.values())
    hold(counted == len(live), f"{core.card.name} counts {counted} sequences and has {len(live)}")


def nothing_left_in_instance(core: InstanceCore) -> None:
    """Every block is free or reusable, every window free, nothing lent, borrowed or awaited."""
    name, scheduler = core.card.name, core.scheduler
    recount_instance(core)
    hold(not scheduler.has_work(), f"{name} still has sequences")
    hold(core.exchange.idle, f"{name} still has wants, transfers or offers")
    hold(scheduler.pool.num_held == 0, f"{name} still holds {scheduler.pool.num_held} blocks")
    windows = scheduler.pool.num_windows - scheduler.pool.num_free_windows
    hold(not windows, f"{name} still has {windows} windows")
    hold(len(scheduler.holds) == 0, f"{name} still has holds")
    hold(not scheduler.claims.owners(), f"{name} still has claims")
    hold(scheduler.holds.promised(("", "")) == 0, f"{name} still promises room")


def nothing_left_in_service(core: ServiceCore) -> None:
    recount_service(core)
    hold(len(core.journal) == 0, f"{core.config.name} still has entries in its journal")
    hold(core.placement.num_queued == 0, f"{core.config.name} still counts a queue")
    for i in core.instances.values():
        left = (i.queued_tokens, i.running, i.running_tokens, len(i.waiting), len(i.coming))
        hold(not any(left), f"{core.config.name} still counts work on {i.name}: {left}")


# --- small things --------------------------------------------------------------------------------


def _of(effects: list[Effect], kind: type) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def _sent(effects: list[Effect], kind: type) -> bool:
    return any(isinstance(send.message, kind) for send in _of(effects, Send))


def _state(core: ServiceCore, peer: str) -> tuple[object, ...]:
    """What a word of `peer` may change."""
    i = core.instances[peer]
    tokens = sum(len(entry.emitted) for entry in core.journal)
    word = (i.state, i.heard_s, i.tokens_seen, i.role, i.epoch, i.draining, id(i.load))
    return (*word, len(core.journal), tokens, sorted(i.entries))


def _stale_rows(core: ServiceCore, peer: str, message: Tokens) -> dict[str, int]:
    """Journal keys of rows that are of another attempt or instance, and the tokens they have."""
    stale: dict[str, int] = {}
    current: set[str] = set()
    for row in message.rows:
        entry = core.journal.get(row.request_id)
        if entry is None:
            continue
        if (entry.instance, entry.attempt) == (peer, row.attempt):
            current.add(entry.key)
        else:
            stale[entry.key] = len(entry.emitted)
    return {key: count for key, count in stale.items() if key not in current}
