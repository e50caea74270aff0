"""What a service says about its cluster: plain structs, for /admin/cluster and `penstock top`.

Made from `ServiceStatus`, so that a service over engines of others, which tell less, says what it
knows in the same words and leaves the rest out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from penstock import __version__
from penstock.protocol.instance import CostModel, InstanceCard, Load
from penstock.service.generation import ServiceStatus
from penstock.service.metrics import Metrics
from penstock.service.recent import Summary, joined
from penstock.service.tiers import TierUse, tiers_of


class KvReport(msgspec.Struct, kw_only=True):
    """In blocks. `used` is held by sequences, `cached` is kept for reuse and given up on demand."""

    used: int
    cached: int
    total: int
    block_tokens: int
    tiers: dict[str, TierUse]
    #: Since the instance started: prompt tokens looked up in its cache, and found.
    query_tokens: int
    hit_tokens: int


class StepsReport(msgspec.Struct, kw_only=True):
    count: int
    #: Since the start.
    mean_s: float | None
    preemptions: int
    #: Predicted end of the one under way, from now; 0 when idle.
    ends_in_s: float


class InstanceReport(msgspec.Struct, kw_only=True):
    """One engine instance. What is None is not known (it has not attached, or is not ours)."""

    name: str
    state: str
    pid: int | None = None
    role: str = "any"
    epoch: int = 0
    incarnation: int = 0
    draining: bool = False
    #: Why it may not be used; empty if it may.
    refusal: str = ""
    host: str | None = None
    device: str | None = None
    model: str | None = None
    address: str | None = None
    endpoints: dict[str, str] = {}
    #: Since its last message.
    silent_s: float | None = None
    #: Sequences that wait there and that run there, and their tokens.
    queue: int = 0
    running: int = 0
    queued_tokens: int = 0
    running_tokens: int = 0
    max_running: int | None = None
    max_num_batched_tokens: int | None = None
    kv: KvReport | None = None
    steps: StepsReport | None = None
    #: Times of requests that this service has sent there, of late.
    ttft_s: Summary | None = None
    tpot_s: Summary | None = None
    #: Actual over predicted TTFT since the start; 1 is a perfect prediction.
    ttft_ratio: float | None = None
    role_changes: int = 0
    cost: CostModel | None = None
    kernels: dict[str, str] = {}


class Totals(msgspec.Struct, kw_only=True):
    """Of the services in `speaks_for`, since their start; rates over the last ten seconds."""

    waiting: int
    running: int
    finished: dict[str, int]
    refused: dict[str, int]
    prompt_tokens: int
    cached_prompt_tokens: int
    generation_tokens: int
    requests_per_s: float
    tokens_per_s: float
    resumed: int
    handovers: int
    migrated: int
    role_changes: int


class Slo(msgspec.Struct, kw_only=True):
    ttft_s: float | None = None
    tpot_s: float | None = None


class ClusterReport(msgspec.Struct, kw_only=True):
    """`GET /admin/cluster`."""

    service: str
    version: str
    model: str
    ready: bool
    reason: str
    uptime_s: float
    policy: str
    #: Services known to the registry, this one among them, and the one that assigns roles.
    routers: list[str]
    leader: str | None
    #: The services whose requests totals and times are about: this one, and with --api-workers
    #: those beside it.
    speaks_for: list[str] = []
    slo: Slo
    ttft_s: Summary
    tpot_s: Summary
    totals: Totals
    instances: list[InstanceReport]


def cluster_report(status: ServiceStatus, metrics: Metrics) -> ClusterReport:
    now_s = metrics.clock()
    facts = status.facts
    slo = Slo(ttft_s=facts.get("ttft_slo_s"), tpot_s=facts.get("tpot_slo_s"))
    return ClusterReport(
        service=str(facts.get("service", "")),
        version=__version__,
        model=metrics.model_name,
        ready=status.ready,
        reason=status.reason,
        uptime_s=now_s - metrics.started_s,
        policy=str(facts.get("policy", "")),
        routers=list(facts.get("routers", ())),
        leader=facts.get("leader"),
        speaks_for=[str(facts.get("service", ""))],
        slo=slo,
        ttft_s=metrics.recent_ttft_s.summary(now_s, slo.ttft_s),
        tpot_s=metrics.recent_tpot_s.summary(now_s, slo.tpot_s),
        totals=_totals(status, metrics, now_s),
        instances=[instance_report(i) for i in status.instances],
    )


def together(own: ClusterReport, others: Sequence[ClusterReport]) -> ClusterReport:
    """What API workers say at the same time, as one: their requests added up, what instances say of
    themselves taken once."""
    reports = [own, *others]
    totals = _sum_of([report.totals for report in reports])
    instances = [
        msgspec.structs.replace(
            instance,
            ttft_s=_joined(i.ttft_s for r in reports for i in r.instances if i.name == name),
            tpot_s=_joined(i.tpot_s for r in reports for i in r.instances if i.name == name),
        )
        for instance in own.instances
        for name in [instance.name]
    ]
    return msgspec.structs.replace(
        own,
        uptime_s=max(report.uptime_s for report in reports),
        speaks_for=sorted(name for report in reports for name in report.speaks_for),
        ttft_s=joined(report.ttft_s for report in reports),
        tpot_s=joined(report.tpot_s for report in reports),
        totals=totals,
        instances=instances,
    )


def _joined(parts: Iterable[Summary | None]) -> Summary | None:
    found = [part for part in parts if part is not None]
    return joined(found) if found else None


def _sum_of(parts: Sequence[Totals]) -> Totals:
    found: dict[str, Any] = {}
    for name in Totals.__struct_fields__:
        values = [getattr(part, name) for part in parts]
        if name == "role_changes":  # of the instances: each service sees the same ones
            found[name] = max(values)
        elif isinstance(values[0], dict):
            kinds = dict.fromkeys(kind for value in values for kind in value)
            found[name] = {kind: sum(value.get(kind, 0) for value in values) for kind in kinds}
        else:
            found[name] = sum(values)
    return Totals(**found)


def _totals(status: ServiceStatus, metrics: Metrics, now_s: float) -> Totals:
    facts = status.facts
    return Totals(
        waiting=metrics.waiting,
        running=metrics.running,
        finished=dict(metrics.finished),
        refused=dict(metrics.refused),
        prompt_tokens=metrics.prompt_tokens,
        cached_prompt_tokens=metrics.cached_prompt_tokens,
        generation_tokens=metrics.generation_tokens,
        requests_per_s=metrics.request_rate.per_second(now_s),
        tokens_per_s=metrics.token_rate.per_second(now_s),
        resumed=status.num_resumed,
        handovers=int(facts.get("handovers", 0)),
        migrated=int(facts.get("migrated", 0)),
        role_changes=int(facts.get("role_changes", 0)),
    )


#: What an entry of `ServiceStatus.instances` may say under the report's own name.
_PLAIN = (
    "pid", "role", "epoch", "incarnation", "draining", "refusal", "address", "silent_s", "queue",
    "running", "queued_tokens", "running_tokens", "ttft_s", "tpot_s", "ttft_ratio", "role_changes",
)  # fmt: skip


def instance_report(found: Mapping[str, Any]) -> InstanceReport:
    report = InstanceReport(
        name=str(found["name"]),
        state=str(found["state"]),
        **{name: found[name] for name in _PLAIN if found.get(name) is not None},
    )
    card: InstanceCard | None = found.get("card")
    load: Load | None = found.get("load")
    if card is not None:
        _describe(report, card)
    if load is not None:
        _weigh(report, card, load)
    return report


def _describe(report: InstanceReport, card: InstanceCard) -> None:
    report.pid = card.pid
    report.host = card.host
    report.device = card.device
    report.model = card.model
    report.endpoints = dict(card.endpoints)
    report.max_running = card.max_num_seqs
    report.max_num_batched_tokens = card.max_num_batched_tokens
    report.kernels = dict(card.kernels)


def _weigh(report: InstanceReport, card: InstanceCard | None, load: Load) -> None:
    # Of everybody's sequences there, as the instance counts them.
    report.queue = sum(load.waiting.values())
    report.running = sum(load.running.values())
    report.queued_tokens, report.running_tokens = load.waiting_tokens, load.running_tokens
    report.draining = report.draining or load.draining
    report.cost = load.cost
    report.steps = StepsReport(
        count=load.steps,
        mean_s=load.step_s / load.steps if load.steps else None,
        preemptions=load.preemptions,
        ends_in_s=load.step_end_in_s,
    )
    report.kv = KvReport(
        used=load.kv_blocks_used,
        cached=load.kv_blocks_cached,
        total=load.kv_blocks_total,
        block_tokens=card.layout.block_tokens if card else 0,
        tiers=tiers_of(load, card.layout.block_bytes if card else None),
        query_tokens=load.prefix_query_tokens,
        hit_tokens=load.prefix_hit_tokens,
    )
