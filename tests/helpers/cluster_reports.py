"""A report of a cluster with everything in it: roles, states, tiers, an SLO that is missed."""

from __future__ import annotations

from penstock.protocol.instance import CostModel
from penstock.service.recent import Summary
from penstock.service.report import (
    ClusterReport,
    InstanceReport,
    KvReport,
    Slo,
    StepsReport,
    Totals,
)
from penstock.service.tiers import TierUse

ROLES = ("prefill", "prefill_to_decode", "decode", "decode", "any")
STATES = ("active", "active", "suspect", "lost", "connecting")


def instance(number: int) -> InstanceReport:
    state = STATES[number % len(STATES)]
    known = state not in ("lost", "connecting")
    return InstanceReport(
        name=f"engine-{number}",
        state=state,
        role=ROLES[number % len(ROLES)],
        epoch=(1 << 32) + number,
        pid=4000 + number if known else None,
        device="cpu",
        draining=number == 1,
        address=f"tcp://10.0.0.{number + 1}:7000",
        queue=3 * number,
        running=12 * number,
        ttft_s=Summary(9, 0.045, 0.045, 0.2, 0.6 * number) if known else None,
        tpot_s=Summary(9, 0.008, 0.0081 * (1 + 3 * number), 0.009, 0.012) if known else None,
        ttft_ratio=1.03 if known else None,
        role_changes=number,
        kv=KvReport(
            used=180 * number, cached=200, total=1000, block_tokens=16, query_tokens=1000,
            hit_tokens=420,
            tiers={
                "device": TierUse(used=180 * number + 200, total=1000),
                "host": TierUse(used=2500, total=4000),
                "disk": TierUse(used=77),
            },
        ) if known else None,
        steps=StepsReport(count=9, mean_s=0.0123, preemptions=0, ends_in_s=0.0) if known else None,
        cost=CostModel(),
    )  # fmt: skip


def report(num_instances: int = 5, **changed: object) -> ClusterReport:
    found = ClusterReport(
        service="router-0",
        version="0.1",
        model="Qwen/Qwen3-0.6B",
        ready=True,
        reason="",
        uptime_s=7984.0,
        policy="slo-aware",
        routers=["router-0", "router-1"],
        leader="router-0",
        slo=Slo(ttft_s=0.5, tpot_s=0.02),
        ttft_s=Summary(120, 0.05, 0.045, 0.2, 0.61, 0.97),
        tpot_s=Summary(120, 0.008, 0.0081, 0.009, 0.012, 1.0),
        totals=Totals(
            waiting=3, running=37, finished={"stop": 900, "error": 1}, refused={"overloaded": 2},
            prompt_tokens=10_000, cached_prompt_tokens=4000, generation_tokens=90_000,
            requests_per_s=12.4, tokens_per_s=1834.2, resumed=2, handovers=41, migrated=1,
            role_changes=3,
        ),
        instances=[instance(i) for i in range(num_instances)],
    )  # fmt: skip
    for name, value in changed.items():
        setattr(found, name, value)
    return found
