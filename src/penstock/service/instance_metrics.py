"""What /metrics says of each instance: a series for each, labelled `engine`, as vLLM labels them.

Cardinality is bounded by instances times small fixed sets (roles, states, tiers, means).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from penstock.protocol.instance import InstanceCard, Load, MoveCounts
from penstock.service.cluster.outcomes import Outcomes
from penstock.service.tiers import TierUse, tiers_of

PREFIX = "penstock:"

#: What an instance's `Load` carries: (name, text, how to read it).
_LOAD_GAUGES: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("kv_cache_usage_perc", "KV blocks in use; 1 is all of them.",
     lambda load: load.kv_blocks_used / max(1, load.kv_blocks_total)),
    ("instance_requests_running", "Sequences that the instance runs.",
     lambda load: sum(load.running.values())),
    ("instance_requests_waiting", "Sequences in the instance's queue.",
     lambda load: sum(load.waiting.values())),
    ("instance_running_tokens", "Tokens of the sequences that run.",
     lambda load: load.running_tokens),
    ("instance_waiting_tokens", "Tokens of the sequences that wait.",
     lambda load: load.waiting_tokens),
    ("instance_kv_blocks_cached", "KV blocks kept for reuse.",
     lambda load: load.kv_blocks_cached),
)  # fmt: skip
_LOAD_COUNTERS: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("num_preemptions", "Sequences that lost their KV to others.",
     lambda load: load.preemptions),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.",
     lambda load: load.prefix_query_tokens),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.",
     lambda load: load.prefix_hit_tokens),
    ("engine_steps", "Steps that the instance has computed.", lambda load: load.steps),
    ("engine_step_seconds", "Time in steps.", lambda load: load.step_s),
    ("engine_step_gaps", "Pauses between two steps while there was work.",
     lambda load: load.step_gaps),
    ("engine_step_gap_seconds", "Time in them: nothing was computed.",
     lambda load: load.step_gap_s),
    ("kv_maps_ahead", "KV blocks mapped while another step was computed.",
     lambda load: load.maps.ahead),
    ("kv_map_ahead_seconds", "Time that took, off the steps' path.",
     lambda load: load.maps.ahead_s),
    ("kv_maps_at_start", "KV blocks mapped while their step waited.",
     lambda load: load.maps.at_start),
    ("kv_map_at_start_seconds", "Time that took, at the start of steps.",
     lambda load: load.maps.at_start_s),
)  # fmt: skip


_STATUS_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("instance_epoch", "Grows with each change of the role.", "epoch"),
    ("instance_draining", "1 while the instance takes nothing new.", "draining"),
    ("instance_silent_seconds", "Since its last message.", "silent_s"),
    ("instance_requests_placed_waiting", "Sequences of this service without a token yet.", "queue"),
    ("instance_requests_placed_running", "Sequences of this service past their first token.",
     "running"),
)  # fmt: skip
_OUTCOMES: tuple[tuple[str, str, Callable[[Outcomes], float]], ...] = (
    ("ttft_predictions", "Placements whose time to first token was predicted.",
     lambda o: o.num_ttft),
    ("ttft_predicted_seconds", "Sum of the predictions.", lambda o: o.predicted_ttft_s),
    ("ttft_actual_seconds", "Sum of what it took.", lambda o: o.actual_ttft_s),
    ("ttft_prediction_error_seconds", "Sum of |predicted - actual|.", lambda o: o.ttft_error_s),
    ("kv_hit_predictions", "Placements whose KV hits were predicted.", lambda o: o.num_hits),
    ("kv_hit_predicted_tokens", "Prompt tokens expected in the instance's cache.",
     lambda o: o.predicted_hit_tokens),
    ("kv_hit_actual_tokens", "Prompt tokens found there.", lambda o: o.actual_hit_tokens),
    ("kv_hit_error_tokens", "Sum of |expected - found|.", lambda o: o.hit_error_tokens),
)  # fmt: skip
_TIERS: tuple[tuple[str, str, Callable[[TierUse], float | None]], ...] = (
    ("kv_tier_blocks_used", "KV blocks in a tier, in use or kept for reuse.", lambda t: t.used),
    ("kv_tier_blocks_total", "KV blocks that a tier has room for.", lambda t: t.total),
    ("kv_tier_bytes_used", "The same in bytes.", lambda t: t.used_bytes),
    ("kv_tier_usage_perc", "Share of a tier's room; 1 is all of it.",
     lambda t: t.used / t.total if t.total else None),
)  # fmt: skip
_MOVES: tuple[tuple[str, str, Callable[[MoveCounts], float]], ...] = (
    ("kv_transfer_blocks", "KV blocks that came from a peer or a slower tier.",
     lambda m: m.blocks),
    ("kv_transfer_failed_blocks", "Blocks that were wanted and did not come whole.",
     lambda m: m.failed),
    ("kv_transfer_bytes", "Bytes that came.", lambda m: m.num_bytes),
    ("kv_transfer_seconds", "Time from the order to the last block, summed.",
     lambda m: m.seconds),
)  # fmt: skip

Found = Mapping[str, Any]
Rows = Sequence[tuple[tuple[str, ...], float]]


def instance_families(model_name: str, instances: Sequence[Found]) -> Iterator[Metric]:
    """Of each instance in `ServiceStatus.instances`: what it says of itself, what this service has
    placed there, and what came of it."""
    loads: list[tuple[Found, Load]] = [(i, i["load"]) for i in instances if i.get("load")]
    table = _Table(model_name)
    for name, text, read in _LOAD_GAUGES:
        yield table.gauge(name, text, [((i["name"],), read(load)) for i, load in loads])
    for name, text, read in _LOAD_COUNTERS:
        yield table.counter(name, text, [((i["name"],), read(load)) for i, load in loads])
    yield from _states(table, instances)
    yield table.gauge(
        "instance_step_residual_seconds",
        "Mean error of the instance's own cost model, over its last steps.",
        [((i["name"],), load.cost.residual_s) for i, load in loads],
    )
    done: list[tuple[str, Outcomes]] = [
        (i["name"], i["outcomes"]) for i in instances if i.get("outcomes") is not None
    ]
    for name, text, count in _OUTCOMES:
        yield table.counter(name, text, [((engine,), count(found)) for engine, found in done])
    yield from _tiers(table, loads)
    for name, text, moved in _MOVES:
        rows = [((i["name"], m.means), moved(m)) for i, load in loads for m in load.moves]
        yield table.counter(name, text, rows, "means")
    yield _kernels(table, instances)


class _Table:
    """Families whose series are labelled with the model, the engine, and a thing or two more."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def gauge(self, name: str, text: str, rows: Rows, *more: str) -> Metric:
        labels = ["model_name", "engine", *more]
        return self._fill(GaugeMetricFamily(PREFIX + name, text, labels=labels), rows)

    def counter(self, name: str, text: str, rows: Rows, *more: str) -> Metric:
        labels = ["model_name", "engine", *more]
        return self._fill(CounterMetricFamily(PREFIX + name, text, labels=labels), rows)

    def _fill(self, family: GaugeMetricFamily | CounterMetricFamily, rows: Rows) -> Metric:
        for labels, value in rows:
            family.add_metric([self._model_name, *labels], value)
        return family


def _states(table: _Table, instances: Sequence[Found]) -> Iterator[Metric]:
    states = [((i["name"], str(i["state"])), 1.0) for i in instances]
    yield table.gauge("instance_state", "1 for the state that the instance is in.", states, "state")
    roles = [((i["name"], str(i.get("role", "any"))), 1.0) for i in instances]
    yield table.gauge("instance_role", "1 for the role that the instance has.", roles, "role")
    for name, text, key in _STATUS_GAUGES:
        rows = [((i["name"],), float(i[key])) for i in instances if i.get(key) is not None]
        yield table.gauge(name, text, rows)
    changes = [((i["name"],), float(i.get("role_changes", 0))) for i in instances]
    yield table.counter("role_changes", "How often the instance's role has changed.", changes)


def _tiers(table: _Table, loads: Sequence[tuple[Found, Load]]) -> Iterator[Metric]:
    found: list[tuple[str, str, TierUse]] = []
    for instance, load in loads:
        card: InstanceCard | None = instance.get("card")
        uses = tiers_of(load, card.layout.block_bytes if card else None)
        found += [(instance["name"], tier, use) for tier, use in uses.items()]
    for name, text, read in _TIERS:
        values = [((engine, tier), read(use)) for engine, tier, use in found]
        rows = [(labels, value) for labels, value in values if value is not None]
        yield table.gauge(name, text, rows, "tier")


def _kernels(table: _Table, instances: Sequence[Found]) -> Metric:
    rows: list[tuple[tuple[str, ...], float]] = []
    for instance in instances:
        card: InstanceCard | None = instance.get("card")
        for operation, kernel in sorted(card.kernels.items()) if card else ():
            rows.append(((instance["name"], operation, kernel), 1.0))
    return table.gauge("kernel_info", "The kernels in use.", rows, "operation", "kernel")
