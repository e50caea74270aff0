"""What /metrics says of each instance: a series for each, labelled `engine`, as vLLM labels them.

Cardinality is bounded by instances times small fixed sets (roles, states, tiers, means).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from penstock.protocol.instance import InstanceCard, Load

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


def instance_families(model_name: str, instances: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """Of each instance in `ServiceStatus.instances`: its name, last `Load`, card and state."""
    labels = ["model_name", "engine"]
    loads: list[tuple[str, Load]] = [(i["name"], i["load"]) for i in instances if i.get("load")]
    for name, text, read in _LOAD_GAUGES:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=labels)
        for engine, load in loads:
            gauge.add_metric([model_name, engine], read(load))
        yield gauge
    for name, text, read in _LOAD_COUNTERS:
        counter = CounterMetricFamily(PREFIX + name, text, labels=labels)
        for engine, load in loads:
            counter.add_metric([model_name, engine], read(load))
        yield counter
    yield _infos(model_name, instances)


def _infos(model_name: str, instances: Sequence[Mapping[str, Any]]) -> Metric:
    labels = ["model_name", "engine", "operation", "kernel"]
    kernels = GaugeMetricFamily(PREFIX + "kernel_info", "The kernels in use.", labels=labels)
    for instance in instances:
        card: InstanceCard | None = instance.get("card")
        for operation, kernel in sorted(card.kernels.items()) if card else ():
            kernels.add_metric([model_name, instance["name"], operation, kernel], 1)
    return kernels
