"""How long it takes until an instance has another role, and what a steady load notices of it.

    python -m benchmarks.role_switch [--switches 20] [--seconds 12] [--json FILE]

Real processes: one service and three engines (float32, a small model), roles given by hand as an
operator gives them. At idle: from the order (POST /admin/instances/NAME/role is sent) until the
instance itself has said what it is now (Assigned, as GET /admin/cluster shows it), and until the
first token of a request that it serves in its new role; nothing is started or loaded in between.
Under load: such orders while requests arrive at a steady pace; TTFT and TPOT of
those that arrived before, within a second after an order, and later.
"""

from __future__ import annotations

import benchmarks.dev_packages  # noqa: F401  says what is missing

# isort: split
import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.cluster import Answer, ask, body, instances, settle, wait_for, with_role
from tests.helpers.server import running

FLAGS = (
    "--dtype", "float32", "--served-model-name", "m", "--kv-cache-memory-bytes", "32M",
    "--num-threads", "1", "--instances", "3", "--pd", "static=1:2",
)  # fmt: skip
SPLIT = ["decode", "decode", "prefill"]
#: Requests that arrive within this after an order count as "during".
DURING_S = 1.0


@dataclass(frozen=True)
class Turn:
    role: str
    assigned_s: float
    served_s: float


@dataclass(frozen=True)
class Load:
    when: str
    requests: int
    lost: int
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    #: The longest pause of any stream.
    pause_max_s: float


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.role_switch", description=__doc__)
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--every-ms", type=float, default=80.0, help="between two arrivals")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, "qwen3", num_hidden_layers=4, hidden_size=128)
        with running(folder, *FLAGS) as server:
            wait_for(lambda: _roles(server.url) == SPLIT, 60.0, f"the roles {SPLIT}")
            turns = asyncio.run(_turns(server.url, options.switches))
            settle(server)
            wait_for(lambda: _roles(server.url) == SPLIT, 60.0, f"the roles {SPLIT}")
            every_s = options.every_ms / 1e3
            loads = asyncio.run(_under_load(server.url, options.seconds, every_s))
            settle(server)
    report(turns, loads)
    if options.json is not None:
        found = {"idle": [asdict(t) for t in turns], "load": [asdict(x) for x in loads]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _roles(url: str) -> list[str]:
    return sorted(i["role"] for i in instances(url).values() if i["state"] == "active")


# --- at idle -----------------------------------------------------------------------------------


async def _turns(url: str, num_switches: int) -> list[Turn]:
    """The prefill instance and one that decodes change places, again and again: what the leader
    would do by itself half a second later, since it keeps the split."""
    turns: list[Turn] = []
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as client:
        while len(turns) < num_switches:
            await asyncio.to_thread(wait_for, lambda: _roles(url) == SPLIT, 30.0, "the split")
            old, new = (with_role(url, role)["name"] for role in ("prefill", "decode"))
            ordered = [(new, "prefill", *await _turn(client, new, "prefill"))]
            with contextlib.suppress(httpx.HTTPStatusError):  # the leader was faster
                ordered.append((old, "decode", *await _turn(client, old, "decode")))
            served = await _first_served(client, url, 100 * len(turns), ordered[0][:2])
            for name, role, at_s, assigned_s in ordered:
                times_s = served[name, role]
                if times_s:
                    turns.append(Turn(role, assigned_s, min(times_s) - at_s))
    return turns


async def _turn(client: httpx.AsyncClient, name: str, role: str) -> tuple[float, float]:
    """When it was ordered, and how long it took."""
    at_s = time.monotonic()
    order = await client.post(f"/admin/instances/{name}/role", json={"role": role})
    order.raise_for_status()
    while not await _is(client, name, role):
        pass  # each look takes a millisecond or two: that is the resolution
    return at_s, time.monotonic() - at_s


async def _is(client: httpx.AsyncClient, name: str, role: str) -> bool:
    report = (await client.get("/admin/cluster")).json()
    return any(i["name"] == name and i["role"] == role for i in report["instances"])


async def _first_served(
    client: httpx.AsyncClient, url: str, number: int, wanted: tuple[str, str]
) -> dict[tuple[str, str], list[float]]:
    """When first tokens were there, by instance and part, of several requests at once: so that
    each instance gets some. Again until `wanted` has had one."""
    served: dict[tuple[str, str], list[float]] = defaultdict(list)
    for first in range(number, number + 60, 6):
        answers = [Answer() for _ in range(6)]
        bodies = [body(first + i, prompt_tokens=64, max_tokens=20) for i in range(6)]
        await asyncio.gather(*(ask(client, url, b, a) for b, a in zip(bodies, answers)))
        for answer in answers:
            found = (await client.get(f"/admin/requests/{answer.request_id}/explain")).json()
            for p in found["prompts"][0]["choices"][0]["placements"]:
                part = "decode" if p["because"] == "handover" else "prefill"
                if p["actual_ttft_s"] is not None:
                    at_s = answer.started_s + p["at_s"] + p["actual_ttft_s"]
                    served[p["instance"], part].append(at_s)
        if served[wanted]:
            return served
    raise AssertionError(f"{wanted[0]} got nothing to {wanted[1]}")


# --- under load --------------------------------------------------------------------------------


async def _under_load(url: str, seconds: float, every_s: float) -> list[Load]:
    """After each third the busiest decode instance is to prefill, by way of the transition: it
    hands over what it decodes. The leader then turns the other one."""
    answers = [Answer() for _ in range(int(seconds / every_s))]
    orders_s: list[float] = []
    async with httpx.AsyncClient(timeout=60.0, limits=httpx.Limits(max_connections=None)) as client:
        began_s = time.monotonic()

        async def one(number: int) -> None:
            await asyncio.sleep(number * every_s)
            data = body(number, prompt_tokens=100 + number % 7 * 30, max_tokens=60)
            await ask(client, url, data, answers[number])

        async def turn(after_s: float) -> None:
            await asyncio.sleep(after_s)
            name = (await asyncio.to_thread(with_role, url, "decode"))["name"]
            orders_s.append(time.monotonic())
            order = f"{url}/admin/instances/{name}/role"
            (await client.post(order, json={"role": "decode_to_prefill"})).raise_for_status()

        turns = (turn(seconds / 3), turn(2 * seconds / 3))
        await asyncio.gather(*(one(i) for i in range(len(answers))), *turns)
    warm = [a for a in answers if a.started_s - began_s > 0.1 * seconds]
    first_s = orders_s[0]
    before = [a for a in warm if a.started_s < first_s]
    during = [a for a in warm if any(0 <= a.started_s - s < DURING_S for s in orders_s)]
    # Those that were under way when the order came are disturbed by it too.
    under_way = [a for a in warm if any(_lives(a, s) for s in orders_s)]
    after = [a for a in warm if a.started_s >= first_s and a not in during]
    return [
        _summary("before", [a for a in before if a not in under_way]),
        _summary("under way at the order", under_way),
        _summary(f"within {DURING_S:g} s after it", during),
        _summary("later", [a for a in after if a not in under_way]),
    ]


def _lives(answer: Answer, at_s: float) -> bool:
    return answer.started_s < at_s < answer.started_s + (answer.times_s or [0.0])[-1]


def _summary(when: str, answers: list[Answer]) -> Load:
    good = [a for a in answers if a.ends == ["length"] and a.times_s]
    ttft_s = sorted(a.times_s[0] for a in good) or [0.0]
    # Some tokens have no text of their own, so the tokens are counted, not the pieces of text.
    tpot_s = sorted((a.times_s[-1] - a.times_s[0]) / 59 for a in good) or [0.0]
    return Load(
        when,
        len(answers),
        len(answers) - len(good),
        statistics.median(ttft_s),
        ttft_s[int(0.99 * (len(ttft_s) - 1) + 0.5)],
        statistics.median(tpot_s),
        tpot_s[int(0.99 * (len(tpot_s) - 1) + 0.5)],
        max((a.pause_s() for a in good), default=0.0),
    )


def report(turns: list[Turn], loads: list[Load]) -> None:
    print("| at idle, median (max) of | Assigned after | first token in the new role after |")
    print("|---|---|---|")
    for role in ("prefill", "decode"):
        mine = [t for t in turns if t.role == role]
        if mine:
            assigned, served = [t.assigned_s for t in mine], [t.served_s for t in mine]
            print(f"| {len(mine)} to {role} | {_ms(assigned)} | {_ms(served)} |")
    print()
    print("| requests, by arrival | number | lost | TTFT p50 / p99 | TPOT p50 / p99 | pause, max |")
    print("|---|---|---|---|---|---|")
    for x in loads:
        print(
            f"| {x.when} | {x.requests} | {x.lost} "
            f"| {1e3 * x.ttft_p50_s:.0f} / {1e3 * x.ttft_p99_s:.0f} ms "
            f"| {1e3 * x.tpot_p50_s:.1f} / {1e3 * x.tpot_p99_s:.1f} ms "
            f"| {1e3 * x.pause_max_s:.0f} ms |"
        )


def _ms(values_s: list[float]) -> str:
    return f"{1e3 * statistics.median(values_s):.1f} ({1e3 * max(values_s):.1f}) ms"


if __name__ == "__main__":
    main()
