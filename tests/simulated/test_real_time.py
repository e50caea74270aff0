"""Real processes whose devices are cost models do what the simulator says they do: the machinery
behind `benchmarks/simulator_validation.py`. How exactly, is for that to measure."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.cli import costs
from penstock.engine.config import EngineConfig
from penstock.engine.instance import InstanceDriver
from penstock.loadgen.costs import hardware, hardware_or_file
from penstock.loadgen.live import Shot, play
from penstock.loadgen.prompts import prompt_ids
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.protocol.transport.open import listen
from penstock.simulator import experiment
from penstock.simulator.real_time import Alarm, SimulatedDevice, read
from penstock.simulator.runner import next_token
from penstock.simulator.spec import ClusterSpec, PoolSpec
from tests.helpers.engines import Instance, address
from tests.helpers.processes import Command
from tests.helpers.real_time import real_time_cluster

MODEL = "h100:llama3.1-8b:fp8:tp1"
#: Prompts of several chunks among them, and answers of one token.
REQUESTS = [
    TraceRequest(0.05 * number, 40 + 700 * (number % 4), 1 + 5 * (number % 5))
    for number in range(24)
]


def test_real_processes_and_the_simulator_agree_on_counts(tmp_path: Path) -> None:
    pool = PoolSpec(count=2, hardware=MODEL)
    spec = ClusterSpec(pools=(pool,), policy="round-robin", pd="off")
    simulated = experiment.run(spec, REQUESTS)
    shots = [
        Shot(
            r.arrival_s,
            {"model": "toy", "prompt": prompt_ids(r, n), "max_tokens": r.output_tokens,
             "ignore_eos": True},
        )
        for n, r in enumerate(REQUESTS)
    ]  # fmt: skip

    async def replay(url: str):
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
            return (await play(http, shots))[0]

    flags = ("--policy", "round-robin", "--pd", "off")
    with real_time_cluster(tmp_path, MODEL, 2, router=flags) as router:
        outcomes = asyncio.run(replay(router.url))
        report = at_rest(router)
        own = tmp_path / "own.json"
        assert costs.run([router.url, "--instance", "gpu-0", "--out", str(own)]) == 0
    assert [o.error for o in outcomes] == [""] * len(REQUESTS)
    assert [o.output_tokens for o in outcomes] == simulated.output_tokens.tolist()
    assert [o.prompt_tokens for o in outcomes] == simulated.input_tokens.tolist()
    assert simulated.finish == ["length"] * len(REQUESTS)
    # Round robin places half of them at each.
    assert [i["ttft_s"]["count"] for i in report["instances"]] == [12, 12]
    assert {i["device"] for i in report["instances"]} == {f"simulated {MODEL}"}
    # What it has fitted to its steps is the model that made them.
    fitted, model = hardware_or_file(str(own)), hardware(MODEL)
    assert fitted.kv_tokens == pytest.approx(model.kv_tokens, abs=16)
    assert fitted.kv_bytes_per_token == model.kv_bytes_per_token
    for new, context in ((1, 1000), (700, 700), (2048, 2048)):
        found_s = fitted.step_s(new, 1, context, new * context)
        assert found_s == pytest.approx(model.step_s(new, 1, context, new * context), rel=0.1)
    # An engine in real time is never faster than its model says.
    for request, outcome in zip(REQUESTS, outcomes):
        assert outcome.ttft_s > 0.95 * hardware(MODEL).prefill_s(request.input_tokens)


def at_rest(router: Command) -> dict[str, Any]:
    """What the router says once every instance has given back all that it held."""
    end_s = time.monotonic() + 30.0
    while True:
        report = router.get("/admin/cluster")
        held = [(i["kv"]["used"], i["queue"], i["running"]) for i in report["instances"]]
        if held == [(0, 0, 0)] * len(held):
            return report
        assert time.monotonic() < end_s, f"(blocks, waiting, running) at each: {held}"
        time.sleep(0.1)


def test_tokens_are_those_of_the_simulated_model(tmp_path: Path) -> None:
    device = SimulatedDevice(hardware(MODEL), hashed=True)
    config = EngineConfig("toy", max_model_len=512)
    engine = device.build(config, name="a", incarnation=1)
    driver = InstanceDriver(engine.core, engine.runner, mover=engine.mover)
    driver.warm_up()
    endpoint = listen(address(tmp_path, "a"), "a")
    thread = threading.Thread(target=driver.run, args=(endpoint,), daemon=True)
    thread.start()
    service = Instance(address(tmp_path, "a"), "a")
    try:
        ids = list(range(5, 105))
        answer = service.run("r", ids)
        again = service.run("s", ids)  # from the cache of the first one
    finally:
        service.close()
        driver.stop()
        thread.join(30)
    assert not thread.is_alive()
    for token in answer:
        assert token == next_token(ids, 4096)
        ids.append(token)
    assert again == answer


def test_an_alarm_calls_in_order_and_nothing_after_its_end() -> None:
    called: list[int] = []
    alarm = Alarm()
    now_s = time.monotonic()
    for number in (3, 1, 2):
        alarm.at(now_s + 0.01 * number, lambda number=number: called.append(number))
    last = threading.Event()
    alarm.at(now_s + 0.04, last.set)
    assert last.wait(30)
    alarm.at(time.monotonic() + 3600, lambda: called.append(4))
    alarm.close()
    alarm.at(time.monotonic(), lambda: called.append(5))
    assert called == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy", "--address", "tcp://127.0.0.1:0"], "which hardware"),
        (
            ["toy", "--hardware", "abacus", "--address", "tcp://127.0.0.1:0"],
            "in place of abacus",
        ),
        (["toy", "--hardware", MODEL], "where do services find it"),
        (["toy", "--hardware", MODEL, "--adress", "x"], "there is no flag --adress"),
    ],
)
def test_bad_flags_are_said_plainly(arguments: list[str], message: str, monkeypatch) -> None:
    monkeypatch.delenv("PENSTOCK_REGISTRY", raising=False)
    with pytest.raises(ConfigError, match=message):
        read(arguments)
