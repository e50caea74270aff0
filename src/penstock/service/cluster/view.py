"""The instances that take new work, as arrays for the policies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from penstock.service.cluster.instances import Instance
from penstock.service.policies.routing import ROLES, ClusterView, Floats


def view_of(instances: Sequence[Instance]) -> ClusterView:
    """`instances` take work, each has shown its card. Those that wait for a prompt which another
    instance computes count as running: they will be."""
    cards = [i.card for i in instances if i.card is not None]
    assert len(cards) == len(instances), "an active instance has shown its card"
    costs = [i.load.cost if i.load else card.cost for i, card in zip(instances, cards)]
    hosts: dict[str, int] = {}

    def column(values: Iterable[float]) -> Floats:
        return np.array(list(values), dtype=np.float64)

    def free_blocks(instance: Instance) -> float:
        load = instance.load
        return float(load.kv_blocks_total - load.kv_blocks_used) if load else np.inf

    return ClusterView(
        names=tuple(i.name for i in instances),
        roles=np.array([ROLES.index(i.role) for i in instances]),
        queued_tokens=column(i.queued_tokens + i.others.queued_tokens for i in instances),
        queued=column(len(i.entries) - i.running + i.others.queued for i in instances),
        running=column(i.running + i.others.running + len(i.coming) for i in instances),
        running_tokens=column(
            i.running_tokens + i.others.running_tokens + i.coming_tokens for i in instances
        ),
        step_left_s=column(i.load.step_end_in_s if i.load else 0.0 for i in instances),
        base_s=column(c.base_s for c in costs),
        per_token_s=column(c.per_token_s for c in costs),
        per_row_s=column(c.per_row_s for c in costs),
        per_context_token_s=column(c.per_context_token_s for c in costs),
        per_attention_s=column(c.per_attention_s for c in costs),
        residual_s=column(c.residual_s for c in costs),
        num_steps=column(c.num_steps for c in costs),
        ttft_ratio=column(1.0 for _ in instances),
        step_tokens=column(card.max_num_batched_tokens for card in cards),
        max_running=column(card.max_num_seqs for card in cards),
        free_blocks=column(free_blocks(i) for i in instances),
        total_blocks=column(card.num_blocks for card in cards),
        hosts=np.array([hosts.setdefault(card.host or card.name, len(hosts)) for card in cards]),
    )
