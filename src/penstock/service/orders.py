"""What instances are told about a sequence, made from its journal entry."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES, Fetch, KvSource
from penstock.protocol.request import Stage, Submit
from penstock.service.cluster.instances import Instance
from penstock.service.journal import Entry
from penstock.service.policies.view import Decision
from penstock.service.recovery import way_of

#: Room for a fetched prompt is kept this long beyond the predicted end of its prefill (twice that).
_FETCH_LEASE_S = 5.0


def submit(
    entry: Entry,
    instance: Instance,
    *,
    service: str,
    service_incarnation: int,
    decode: Instance | None,
    source: KvSource | None,
    now: float,
) -> Submit:
    """Run the sequence from where it stands. With `decode`, only up to its first token."""
    assert instance.card is not None
    sampling = entry.sampling
    if not entry.lacks_prompt_logprobs:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
    return Submit(
        request_id=entry.key,
        attempt=entry.attempt,
        service=service,
        service_incarnation=service_incarnation,
        prompt_ids=entry.prompt_ids,
        resumed_ids=list(entry.emitted),
        sampling=sampling,
        choice=entry.choice,
        group=entry.request_id,
        block_keys=entry.block_keys(instance.card.model_digest),
        cache_salt=entry.cache_salt,
        constraint=entry.constraint,
        request_class=entry.request_class,
        priority=_priority(entry),
        plan=_plan(entry, instance, decode),
        kv_source=source,
        total_budget_s=None if entry.deadline_s is None else entry.deadline_s - now,
        max_step_s=entry.max_step_s,
    )


def _priority(entry: Entry) -> int:
    """Within the priority that its user gave it: whose tokens flow already, or who has waited for
    very long, comes first; who is too late for its SLO anyway comes last."""
    urgent = entry.overdue or bool(entry.emitted)
    return 3 * entry.priority + (-1 if urgent else int(entry.deferred))


def _plan(entry: Entry, instance: Instance, decode: Instance | None) -> list[Stage]:
    """Epochs fence the roles that the decision was made for. One that has just been found too old
    is left out until the instance has said what it is; a label alone never keeps work away."""
    if decode is not None:
        return [
            Stage("prefill", instance.name, instance.epoch),
            Stage("decode", decode.name, decode.epoch),
        ]
    if instance.epoch == 0 or instance.epoch_in_doubt:
        return []
    return [Stage("decode" if entry.emitted else "prefill", instance.name, instance.epoch)]


def fetch(entry: Entry, to: Instance, source: Instance, ttft_s: float) -> Fetch | None:
    """Bring the prompt's blocks here as `source` computes them; None if it has no whole block."""
    assert to.card is not None
    num_blocks = len(entry.prompt_ids) // BLOCK_TOKENS
    peer = kv_source(source, len(entry.prompt_ids))
    if peer is None:
        return None
    return Fetch(
        request_id=entry.key,
        attempt=entry.attempt,
        keys=entry.block_keys(to.card.model_digest)[: num_blocks * KEY_BYTES],
        source=peer,
        num_tokens=entry.num_tokens + 1,
        lease_s=_FETCH_LEASE_S + 2 * ttft_s,
        epoch=to.epoch,
    )


def kv_source(source: Instance, num_tokens: int) -> KvSource | None:
    """The blocks of `num_tokens` leading tokens, as far as they are whole ones, if peers can reach
    who has them."""
    num_blocks = num_tokens // BLOCK_TOKENS
    if source.card is None or num_blocks == 0:
        return None
    address = source.card.endpoints.get("control")
    if address is None:
        return None
    return KvSource(source.name, source.incarnation, address, num_blocks)


def source(
    entry: Entry, decision: Decision, prefilled_on: str | None, instances: Mapping[str, Instance]
) -> KvSource | None:
    """Whom to fetch leading blocks from: as decided, or where the prompt was computed."""
    if (way := way_of(decision)) is not None:
        giver = instances.get(way.source or "")
        return None if giver is None else kv_source(giver, way.tokens)
    if decision.source is not None and decision.source in instances:
        return kv_source(instances[decision.source], decision.source_tokens)
    if prefilled_on is None or prefilled_on == decision.instance:
        return None
    return held_by(instances[prefilled_on], entry)


def held_by(instance: Instance, entry: Entry) -> KvSource | None:
    """What an instance has that has just let go of the sequence: the KV of the last token was
    never computed."""
    return kv_source(instance, entry.num_tokens - 1)
