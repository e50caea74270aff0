"""Pauses between steps: counted where there was work, and told to whoever reads /metrics."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from tests.unit.test_instance_core import Bench

from penstock.engine.scheduler.batch import RowResult, StepResult
from penstock.protocol.instance import Load, MapCounts
from penstock.service.generation import ServiceStatus
from penstock.service.metrics import Metrics


class GapBench(Bench):
    def finish(self, gap_s: float, maps: MapCounts | None = None) -> None:
        """The step under way took 10 ms, after a pause of `gap_s`."""
        batch = self.launched.pop(0)
        rows = [RowResult(row.slot, [5] if row.samples else []) for row in batch.rows]
        result = StepResult(batch.step, rows, 0.01, gap_s=gap_s)
        if maps is not None:
            result = replace(result, maps=maps)
        self.now += 0.01
        self._take(self.core.on_step_done(result, self.now))

    def load(self) -> Load:
        return self.core.load(self.now)


def test_a_pause_for_want_of_work_is_no_gap() -> None:
    bench = GapBench()
    bench.attach()
    bench.submit("first")  # 4 tokens: 4 steps
    for gap_s in (7.0, 0.001, 0.002, 0.003):
        bench.finish(gap_s)
    assert not bench.launched
    bench.now += 60.0
    bench.submit("second")
    for gap_s in (60.0, 0.004):
        bench.finish(gap_s)
    load = bench.load()
    assert load.steps == 6
    assert load.step_gaps == 4
    assert abs(load.step_gap_s - 0.010) < 1e-9
    assert abs(load.step_s - 0.06) < 1e-9


def test_a_step_that_waits_for_the_host_is_a_gap() -> None:
    bench = GapBench(overlap_steps=1)
    bench.attach()
    bench.submit()
    for gap_s in (7.0, 0.5, 0.25, 0.125):
        bench.finish(gap_s)
    load = bench.load()
    assert (load.step_gaps, load.step_gap_s) == (3, 0.875)


def test_metrics_have_gaps_and_maps_of_each_instance() -> None:
    bench = GapBench()
    bench.attach()
    bench.submit()
    maps = MapCounts(ahead=5, ahead_s=0.002, at_start=3, at_start_s=0.001)
    bench.finish(0.0)
    bench.finish(0.25, maps)
    instance: dict[str, Any] = {"name": "engine-0", "state": "active", "load": bench.load()}
    status = ServiceStatus(
        live=True, ready=True, reason="", queue_depth=0, instances=[instance], num_resumed=0
    )
    text = Metrics("m", lambda: status).render().decode()
    of = 'engine="engine-0",model_name="m"'
    for name, value in {
        "engine_steps": 2.0,
        "engine_step_gaps": 1.0,
        "engine_step_gap_seconds": 0.25,
        "engine_step_seconds": 0.02,
        "kv_maps_ahead": 5.0,
        "kv_map_ahead_seconds": 0.002,
        "kv_maps_at_start": 3.0,
        "kv_map_at_start_seconds": 0.001,
    }.items():
        assert f"penstock:{name}_total{{{of}}} {value}" in text, name
