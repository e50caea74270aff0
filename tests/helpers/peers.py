"""Instances on a virtual clock whose service is the test: messages by hand, tokens as they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penstock.engine.core import InstanceCore
from penstock.protocol.codec import PROTOCOL_VERSION
from penstock.protocol.effects import Effect, Send
from penstock.protocol.instance import Attach, Load
from penstock.protocol.kv import Fetch, Fetched, KvSource, Refused, block_keys, root_key
from penstock.protocol.request import SamplingParams, Stage, Submit
from penstock.protocol.tokens import Credit, Tokens
from penstock.simulator.runner import next_token
from penstock.simulator.world import VOCAB_SIZE, World

EOS = 0


def undisturbed(prompt_ids: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        ids.append(next_token(ids, VOCAB_SIZE))
    return ids[len(prompt_ids) :]


@dataclass
class HandService:
    """A service core that sends what the test tells it to, and writes down what comes back."""

    world: World
    name: str = "s"
    ids: dict[str, dict[int, int]] = field(default_factory=dict)  # by request and place
    finish: dict[tuple[str, int], str] = field(default_factory=dict)
    fetched: dict[str, Fetched] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    loads: dict[str, Load] = field(default_factory=dict)
    #: Everything else.
    heard: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world.add_node(self.name, self)

    def on_message(self, peer: str, message: Any, now: float) -> list[Effect]:
        match message:
            case Tokens():
                for row in message.rows:
                    known = self.ids.setdefault(row.request_id, {})
                    for place, token in enumerate(row.ids, row.start):
                        assert known.setdefault(place, token) == token, "a token has changed"
                    if row.finish:
                        self.finish[row.request_id, row.attempt] = row.finish
                return [Send(peer, Credit(message.number))]
            case Fetched():
                self.fetched[message.request_id] = message
            case Refused():
                self.refused.append(message)
            case Load():
                self.loads[message.instance] = message
                return [Send(peer, Credit(0))]
            case _:
                self.heard.append(message)
        return []

    def on_timer(self, now: float) -> list[Effect]:
        return []

    # --- what the test says --------------------------------------------------------------------

    def say(self, instance: str, message: Any, at_s: float | None = None) -> None:
        at_s = self.world.now if at_s is None else at_s
        self.world.at(at_s, lambda: self.world.send(self.name, instance, message))

    def attach(self, *instances: str) -> None:
        for instance in instances:
            self.say(instance, Attach(self.name, 1, PROTOCOL_VERSION, kv_events=True))

    def submit(
        self,
        instance: str,
        request_id: str,
        prompt_ids: list[int],
        *,
        max_tokens: int = 16,
        attempt: int = 1,
        resumed: int = 0,
        source: KvSource | None = None,
        plan: list[Stage] | None = None,
        at_s: float | None = None,
    ) -> None:
        resumed_ids = [self.ids[request_id][i] for i in range(resumed)]
        submit = Submit(
            request_id=request_id,
            attempt=attempt,
            service=self.name,
            service_incarnation=1,
            prompt_ids=prompt_ids,
            resumed_ids=resumed_ids,
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            block_keys=keys_of(prompt_ids + resumed_ids),
            kv_source=source,
            plan=plan or [],
        )
        self.say(instance, submit, at_s)

    def fetch(
        self,
        instance: str,
        request_id: str,
        prompt_ids: list[int],
        source: KvSource,
        *,
        attempt: int = 1,
        lease_s: float = 5.0,
        epoch: int = 0,
    ) -> None:
        self.say(
            instance,
            Fetch(
                request_id=request_id,
                attempt=attempt,
                keys=keys_of(prompt_ids),
                source=source,
                num_tokens=len(prompt_ids) + 16,
                lease_s=lease_s,
                epoch=epoch,
            ),
        )

    def output(self, request_id: str) -> list[int]:
        known = self.ids.get(request_id, {})
        assert sorted(known) == list(range(len(known))), "a token is missing"
        return [known[i] for i in range(len(known))]


def keys_of(ids: list[int]) -> bytes:
    return block_keys(root_key("simulated"), ids)


def source_of(core: InstanceCore, num_blocks: int) -> KvSource:
    card = core.card
    return KvSource(card.name, card.incarnation, card.endpoints["control"], num_blocks)


def check_nothing_is_left(*cores: InstanceCore) -> None:
    """Every block is free or reusable, every window free, nothing lent, borrowed or awaited."""
    for core in cores:
        core.scheduler.check()
        core.exchange.check()
        assert core.exchange.idle, core.card.name
        assert not core.scheduler.has_work()
        assert core.scheduler.pool.num_held == 0
        assert core.scheduler.pool.num_free_windows == core.scheduler.pool.num_windows
        assert len(core.scheduler.holds) == 0 and not core.scheduler.claims.owners()
        assert core.scheduler.holds.promised(("", "")) == 0
