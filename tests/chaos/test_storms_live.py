"""The storms of the simulator at small scale, against real processes: the same plain data, with
SIGKILL, SIGSTOP, drains, starts, and a registry that does not answer.

Two routers share a registry in the first; clients ask the second. Each client must see one end and
the text of the undisturbed run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.simulator.storms.asks import prompt_of
from penstock.simulator.storms.storm import (
    Ask,
    Crash,
    Drain,
    Fault,
    Halt,
    RegistryLoss,
    Shape,
    Storm,
)
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.cluster import Answer, ask, instances
from tests.helpers.processes import Command, Processes, processes
from tests.helpers.server import free_port

SHAPE = Shape(num_instances=3, registry=True, policy="slo-aware", pd="auto")
#: That is the model's context.
MAX_TOKENS = 512
#: Of the instances this one is left alone, so that every request can be finished.
SPARED = "c"
FLAGS = (
    "--dtype", "float32", "--kv-cache-memory-bytes", "8M",
    "--num-threads", "1",
)  # fmt: skip


def live_storm(seed: int) -> Storm:
    """Within a few seconds, and of what can be done to processes from outside."""
    draw = random.Random(seed)
    asks = tuple(_one_of_them(draw, number) for number in range(12))
    faults = [_fault(draw, round(0.2 + draw.random() * 2.0, 2)) for _ in range(3)]
    return Storm(
        seed=seed,
        shape=SHAPE,
        asks=asks,
        faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
    )


def _one_of_them(draw: random.Random, number: int) -> Ask:
    at_s = round(draw.random() * 1.5, 2)
    shared, own = draw.choice((0, 48, 96)), draw.choice((1, 40, 150))
    return Ask(
        number=number,
        at_s=at_s,
        shared_tokens=shared,
        own_tokens=own,
        max_tokens=min(draw.choice((40, 200, 300)), MAX_TOKENS - shared - own),
    )


def _fault(draw: random.Random, at_s: float) -> Fault:
    node = draw.choice([name for name in SHAPE.instances if name != SPARED])
    match draw.choice(("crash", "crash", "halt", "drain", "registry")):
        case "crash":
            return Crash(at_s=at_s, node=node, again_after_s=draw.choice((0.1, 1.0)))
        case "halt":
            return Halt(at_s=at_s, node=node, for_s=draw.choice((0.5, 2.0, 4.0)))
        case "drain":
            return Drain(at_s=at_s, service="s", node=node, out=False)
        case _:
            return RegistryLoss(at_s=at_s, for_s=draw.choice((1.0, 4.0)))


@dataclass
class Live:
    started: Processes
    model: str
    registry_url: str
    registry: Command
    router: Command
    workers: dict[str, Command] = field(default_factory=dict)

    def start(self, name: str) -> None:
        self.workers[name] = self.started.start(
            "worker", self.model, *FLAGS, "--name", name, "--registry", self.registry_url
        )

    def all_are_there(self) -> None:
        """Whoever has ended, or does so now (who is emptied takes his time), is started again."""

        def there() -> bool:
            for name, worker in list(self.workers.items()):
                if worker.process.poll() is not None:
                    self.start(name)
            return self.router.active() == set(SHAPE.instances)

        self.started.until(there)

    async def strike(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        match fault:
            case Crash(node=node, again_after_s=again_after_s):
                self.workers[node].process.kill()
                await asyncio.to_thread(self.workers[node].process.wait)
                if again_after_s is not None:
                    await asyncio.sleep(again_after_s)
                    self.start(node)
            case Halt(node=node, for_s=for_s):
                await self._halt(self.workers[node], for_s)
            case RegistryLoss(for_s=for_s):
                await self._halt(self.registry, for_s)
            case Drain(node=node):
                async with httpx.AsyncClient(timeout=60.0) as client:
                    url = f"{self.router.url}/admin/instances/{node}/drain"
                    answer = await client.post(url)
                # It may have gone a moment before.
                assert answer.status_code in (202, 404, 409), answer.text
            case _:
                raise AssertionError(f"{fault} cannot be done to processes")

    async def _halt(self, command: Command, for_s: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            command.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(for_s)
            command.process.send_signal(signal.SIGCONT)

    async def play(self, storm: Storm, salt: str) -> list[Answer]:
        """What clients see, in the order of the asks. `salt`: so that nothing is cached before."""
        async with httpx.AsyncClient(timeout=120.0) as client:
            strikes = [asyncio.create_task(self.strike(fault)) for fault in storm.faults]
            asked = [asyncio.create_task(self._ask(client, a, salt)) for a in storm.asks]
            answers = await asyncio.gather(*asked)
            await asyncio.gather(*strikes)
        return list(answers)

    async def _ask(self, client: httpx.AsyncClient, one: Ask, salt: str) -> Answer:
        await asyncio.sleep(one.at_s)
        data: dict[str, Any] = {
            "model": "m",
            "prompt": [token % 300 + 5 for token in prompt_of(one)],
            "max_tokens": one.max_tokens,
            "ignore_eos": True,
            "temperature": float(one.number % 2),
            "seed": one.number,
            "stream": True,
            "cache_salt": salt,
        }
        return await ask(client, self.router.url, data)

    def settle(self) -> None:
        def idle() -> bool:
            found = instances(self.router.url).values()
            return not any(i["running"] or i["queue"] for i in found)

        self.started.until(idle)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("storms")
    make_checkpoint(folder / "model", "qwen3", num_hidden_layers=4, hidden_size=128)
    model, port = str(folder / "model"), free_port()
    url = f"penstock://127.0.0.1:{port}"
    with processes(folder) as started:
        common = ("--served-model-name", "m", "--pd", "auto")
        registry = started.server(
            "router", model, *common, "--registry-address", f"tcp://127.0.0.1:{port}"
        )
        router = started.server("router", model, *common, "--registry", url)
        found = Live(started, model, url, registry, router)
        for name in SHAPE.instances:
            found.start(name)
        found.all_are_there()
        yield found


def storm_with_everything() -> Storm:
    """One instance crashes, one is stopped for longer than it may be silent, then emptied, and the
    registry does not answer meanwhile."""
    faults: tuple[Fault, ...] = (
        Crash(at_s=0.5, node="a", again_after_s=0.1),
        RegistryLoss(at_s=0.6, for_s=3.5),
        Halt(at_s=1.0, node="b", for_s=3.0),
        Drain(at_s=6.0, service="s", node="b", out=False),
    )
    return replace(live_storm(0), faults=faults)


def weather(live: Live, storm: Storm) -> None:
    calm = asyncio.run(live.play(replace(storm, faults=()), f"calm-{storm.seed}"))
    assert [a.ends for a in calm] == [["length"]] * len(storm.asks)
    stormy = asyncio.run(live.play(storm, f"storm-{storm.seed}"))
    assert [a.outcome for a in stormy] == [a.outcome for a in calm], str(storm)
    live.all_are_there()
    live.settle()


@pytest.mark.timeout(400)  # five processes, and whatever else is here
def test_one_storm_with_everything(live: Live) -> None:
    weather(live, storm_with_everything())


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(1, 25))
def test_more_storms(live: Live, seed: int) -> None:
    weather(live, live_storm(seed))
