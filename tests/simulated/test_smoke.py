"""Two instances and a service on a virtual clock: kills, restarts, lost and doubled frames."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine.core import CoreConfig, InstanceCore
from penstock.protocol.request import SamplingParams
from penstock.service.core import ServiceCore
from penstock.service.generation import GenerationSpec
from penstock.simulator.runner import next_token
from penstock.simulator.world import VOCAB_SIZE, NetworkFaults, World

EOS = 0
MAX_MODEL_LEN = 1024


def undisturbed(prompt_ids: list[int], max_tokens: int) -> list[int]:
    """What the simulated model says when nothing goes wrong."""
    ids = list(prompt_ids)
    while len(ids) - len(prompt_ids) < max_tokens and len(ids) < MAX_MODEL_LEN:
        ids.append(next_token(ids, VOCAB_SIZE))
        if ids[-1] == EOS:
            break
    return ids[len(prompt_ids) :]


def specs(seed: int, count: int) -> list[GenerationSpec]:
    draw = random.Random(seed)
    shared = [draw.randrange(1, VOCAB_SIZE) for _ in range(48)]
    made = []
    for number in range(count):
        own = [draw.randrange(1, VOCAB_SIZE) for _ in range(draw.randrange(1, 120))]
        made.append(
            GenerationSpec(
                request_id=f"r{number}",
                prompt_ids=(shared if draw.random() < 0.5 else []) + own,
                sampling=SamplingParams(max_tokens=draw.randrange(1, 60)),
                n=draw.choice((1, 1, 1, 2)),
                request_class=draw.choice(("online", "offline")),
            )
        )
    return made


def storm(
    seed: int,
    faults: NetworkFaults,
    *,
    num_blocks: int = 96,
    engine: CoreConfig = CoreConfig(),  # noqa: B008 (frozen)
) -> World:
    """Both instances are killed in turn and come back; everything must come out right."""
    world = World(seed, faults)
    engines: list[InstanceCore] = [
        world.add_instance("a", num_blocks=num_blocks, core=engine),
        world.add_instance("b", num_blocks=num_blocks, core=engine),
    ]
    service: ServiceCore = world.add_service("s", ["a", "b"])
    draw = random.Random(seed + 1)
    requests = specs(seed, 40)
    for spec in requests:
        world.submit("s", spec, at_s=0.5 + draw.random() * 2)

    def restart(name: str) -> None:
        engines.append(world.add_instance(name, num_blocks=num_blocks, core=engine))

    world.at(1.2, lambda: world.kill("a", noticed_by="s"))
    world.at(2.0, lambda: restart("a"))
    world.at(2.6, lambda: world.kill("b"))  # nobody tells the service: it must hear the silence
    world.at(8.0, lambda: restart("b"))
    world.run(until_s=60.0)
    check(world, service, engines, requests)
    return world


def check(
    world: World,
    service: ServiceCore,
    engines: list[InstanceCore],
    requests: list[GenerationSpec],
) -> None:
    service.check()
    assert len(service.journal) == 0
    for engine in engines[-2:]:
        engine.scheduler.check()
        assert not engine.scheduler.has_work()
    check_outcomes(world, requests)


def check_outcomes(
    world: World, requests: list[GenerationSpec], *, may_be_unavailable: bool = False
) -> None:
    """One end each, and the tokens of an undisturbed run: all of them, or (if nothing was within
    reach for too long) the first ones and a typed error."""
    for spec in requests:
        outcome = world.outcomes[spec.request_id]
        wanted = undisturbed(spec.prompt_ids, spec.sampling.max_tokens)
        reason = "stop" if wanted[-1] == EOS else "length"
        for choice in range(spec.n):
            found = outcome.ids.get(choice, [])
            if may_be_unavailable and outcome.finish[choice] == ["error"]:
                assert found == wanted[: len(found)], spec.request_id
            else:
                assert outcome.finish[choice] == [reason], spec.request_id
                assert found == wanted, spec.request_id


@pytest.mark.parametrize("seed", range(8))
def test_kills_and_duplicates_lose_nothing(seed: int) -> None:
    storm(seed, NetworkFaults(duplicate=0.2))


@pytest.mark.parametrize("seed", range(8))
def test_lost_frames_are_repaired(seed: int) -> None:
    storm(seed, NetworkFaults(duplicate=0.05, loss=0.01))


@pytest.mark.parametrize("seed", range(12))
def test_cuts_and_stopped_processes_lose_nothing(seed: int) -> None:
    """Whoever is cut off or stopped comes back as a zombie; its words must change nothing."""
    world = World(seed, NetworkFaults(duplicate=0.05, loss=0.002))
    engines = [world.add_instance(name, num_blocks=96) for name in ("a", "b")]
    service = world.add_service("s", ["a", "b"])
    draw = random.Random(seed + 100)
    requests = specs(seed, 40)
    for spec in requests:
        world.submit("s", spec, at_s=0.5 + draw.random() * 20)
    for _ in range(4):
        at_s, for_s = 1 + draw.random() * 18, draw.choice((0.3, 1.5, 4.0, 9.0))
        name = draw.choice(("a", "b"))
        if draw.random() < 0.5:
            world.at(at_s, lambda n=name, t=for_s: world.cut("s", n, t))
        else:
            name = draw.choice(("a", "b", "s"))
            world.at(at_s, lambda n=name, t=for_s: world.stop(n, t))
    world.run(until_s=120.0)
    service.check()
    assert len(service.journal) == 0
    for engine in engines:
        engine.scheduler.check()
        assert not engine.scheduler.has_work()
    check_outcomes(world, requests, may_be_unavailable=True)


def test_two_services_on_one_engine_and_one_of_them_dies() -> None:
    world = World(9)
    engine = world.add_instance("a")
    services = [world.add_service(name, ["a"]) for name in ("s", "t")]
    mine = [dataclasses.replace(spec, request_id=f"s{i}") for i, spec in enumerate(specs(9, 20))]
    others = [dataclasses.replace(spec, request_id=f"t{i}") for i, spec in enumerate(specs(10, 20))]
    for spec in mine:
        world.submit("s", spec, at_s=0.5)
    for spec in others:
        world.submit("t", spec, at_s=0.5)
    world.at(0.6, lambda: world.kill("s"))
    world.run(until_s=4.5)
    assert engine.scheduler.live("s") == []  # freed within the bound
    world.run(until_s=30.0)
    services[1].check()
    check_outcomes(world, others)
    engine.scheduler.check()


def test_memory_pressure_preempts_without_loss() -> None:
    storm(3, NetworkFaults(), num_blocks=64)


def test_cancelled_requests_answer_no_more_and_free_everything() -> None:
    world = World(5)
    engines = [world.add_instance("a"), world.add_instance("b")]
    service = world.add_service("s", ["a", "b"])
    requests = specs(5, 30)
    for i, spec in enumerate(requests):
        world.submit("s", spec, at_s=0.5)
        if i % 2:
            world.cancel("s", spec.request_id, at_s=0.5 + 0.005 * i)
    world.run(until_s=20.0)
    service.check()
    assert len(service.journal) == 0
    for engine in engines:
        engine.scheduler.check()
        assert not engine.scheduler.has_work()
    for i, spec in enumerate(requests):
        if i % 2 == 0:
            outcome = world.outcomes[spec.request_id]
            assert outcome.ids[0] == undisturbed(spec.prompt_ids, spec.sampling.max_tokens)


def history_digest(seed: int) -> str:
    world = storm(seed, NetworkFaults(duplicate=0.1, loss=0.005))
    return hashlib.sha256("\n".join(world.history).encode()).hexdigest()


def test_one_seed_one_history_under_any_hash_seed() -> None:
    root = Path(__file__).parents[2]
    found = set()
    for hash_seed in ("1", "2"):
        code = "from tests.simulated.test_smoke import history_digest; print(history_digest(11))"
        env = os.environ | {
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1
    assert history_digest(11) in found
    assert history_digest(12) not in found
