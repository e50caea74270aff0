"""What must not grow, and what must not be counted twice, in the service's core."""

from __future__ import annotations

from tests.unit.test_service_core import Bench

from penstock.protocol.request import Submit
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.explain import Explainer, Record
from penstock.service.policies.routing import round_robin


def test_who_asks_for_a_time_takes_one_turn_like_everybody() -> None:
    bench = Bench()
    bench.core = ServiceCore(ServiceCoreConfig(name="s"), round_robin)
    for name in ("a", "b"):
        bench._take(bench.core.add_instance(name, bench.now))
        bench.attached(name)
    bench.taken(Submit)
    for i in range(8):
        bench.submit(f"r{i}", ttft_slo_s=1000.0)
    went = [peer for peer, _ in bench.taken(Submit)]
    assert went.count("a") == went.count("b") == 4


def test_records_under_one_name_are_bounded() -> None:
    explainer = Explainer(4)
    for _ in range(1000):
        record = Record(request_id="same", choice=0, accepted_s=0.0, prompt_tokens=1)
        explainer.keep(record)
    kept = explainer.of_request("same")
    assert len(kept) == 128 and kept[-1] is record


def test_instances_that_come_and_go_leave_nothing() -> None:
    bench = Bench()
    core = bench.core
    for number in range(20):
        name = f"pod-{number}"
        bench._take(core.add_instance(name, bench.now))
        bench.attached(name)
        bench.submit(f"r{number}")
        bench._take(core.remove_instance(name, bench.now))
    assert not core.instances
    assert not core.placement.view._hosts and not core.placement.view._rows
    assert not core.roles._asked
