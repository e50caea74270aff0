"""What clients see when a part of a cluster fails: real processes, real signals, split requests.

For each fault: how many requests were lost or came out otherwise than in the undisturbed run, how
long it took from the fault until the interrupted ones were placed anew, and from there to their
next token, beside what was predicted for it.

    python -m benchmarks.faults [--streams 24] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import httpx
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.cluster import (
    Answer,
    body,
    instances,
    load,
    send_signal,
    settle,
    wait_for,
    with_role,
)
from tests.helpers.server import Server, running

FLAGS = (
    "--dtype", "float32", "--served-model-name", "m", "--kv-cache-memory-bytes", "32M",
    "--num-threads", "1",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    fault: str
    requests: int
    lost: int
    differing: int
    interrupted: int
    #: From the fault to the new placement; from there to the next token; and as predicted.
    placed_p50_s: float
    placed_max_s: float
    next_token_p50_s: float
    next_token_max_s: float
    predicted_p50_s: float


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description=__doc__)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    bodies = [body(i, max_tokens=200) for i in range(options.streams)]
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, "qwen3", num_hidden_layers=4, hidden_size=128)
        with running(folder, *FLAGS) as server:
            calm = asyncio.run(load(server.url, bodies))
        assert all(a.ends == ["length"] for a in calm), "the undisturbed run failed"
        with running(folder, *FLAGS, "--instances", "3", "--pd", "static=1:2") as server:
            rows = [measure(server, name, fault, bodies, calm) for name, fault in FAULTS.items()]
    print_table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measure(
    server: Server,
    name: str,
    fault: Callable[[Server], Callable[[], None]],
    bodies: list[dict[str, Any]],
    calm: list[Answer],
) -> Row:
    wait_for(lambda: _roles(server) == ["decode", "decode", "prefill"], 60.0, "roles")
    answers, at_s, afterwards = asyncio.run(_disturbed(server, fault, bodies))
    afterwards()
    settle(server)
    lost = sum(a.reset or a.ends != ["length"] for a in answers)
    differing = sum(a.outcome != b.outcome for a, b in zip(answers, calm))
    placed_s, next_s, predicted_s = [], [], []
    for answer in answers:
        for placement in _placements(server, answer):
            since_fault_s = answer.started_s + placement["at_s"] - at_s
            if since_fault_s > 0 and placement["because"] not in ("new", "handover"):
                placed_s.append(since_fault_s)
                next_s.append(placement["actual_ttft_s"] or 0.0)
                predicted_s.append(placement["predicted_ttft_s"] or 0.0)
                break
    return Row(
        name,
        len(answers),
        lost,
        differing,
        len(placed_s),
        *(_middle_and_top(placed_s)),
        *(_middle_and_top(next_s)),
        _middle_and_top(predicted_s)[0],
    )


async def _disturbed(
    server: Server, fault: Callable[[Server], Callable[[], None]], bodies: list[dict[str, Any]]
) -> tuple[list[Answer], float, Callable[[], None]]:
    started = asyncio.Event()
    task = asyncio.create_task(load(server.url, bodies, started))
    await started.wait()
    at_s = time.monotonic()
    afterwards = await asyncio.to_thread(fault, server)
    return await task, at_s, afterwards


def _signal(role: str, number: Any) -> Callable[[Server], Callable[[], None]]:
    def fault(server: Server) -> Callable[[], None]:
        pid = with_role(server.url, role)["pid"]
        send_signal(pid, number)

        def afterwards() -> None:
            if number == SIGSTOP:
                try:
                    send_signal(pid, SIGCONT)
                except ProcessLookupError:
                    pass  # it was killed and replaced meanwhile

        return afterwards

    return fault


def _order(to: str, what: str, **data: str) -> Callable[[Server], Callable[[], None]]:
    def fault(server: Server) -> Callable[[], None]:
        name = with_role(server.url, to)["name"]
        url = f"{server.url}/admin/instances/{name}/{what}"
        httpx.post(url, json=data or None).raise_for_status()
        return lambda: None

    return fault


FAULTS = {
    "nothing": lambda server: lambda: None,
    "kill -9 of prefill": _signal("prefill", SIGKILL),
    "kill -9 of a decode": _signal("decode", SIGKILL),
    "SIGSTOP of prefill": _signal("prefill", SIGSTOP),
    "SIGSTOP of a decode": _signal("decode", SIGSTOP),
    "decode becomes prefill": _order("decode", "role", role="prefill"),
}


def _roles(server: Server) -> list[str]:
    return sorted(i["role"] for i in instances(server.url).values() if i["state"] == "active")


def _placements(server: Server, answer: Answer) -> list[dict[str, Any]]:
    if not answer.request_id:
        return []
    found = httpx.get(f"{server.url}/admin/requests/{answer.request_id}/explain").json()
    placements: list[dict[str, Any]] = found["prompts"][0]["choices"][0]["placements"]
    return placements


def _middle_and_top(values: list[float]) -> tuple[float, float]:
    return (statistics.median(values), max(values)) if values else (0.0, 0.0)


def print_table(rows: list[Row]) -> None:
    print("| fault | requests | lost | differing | interrupted | placed anew after, p50 / max "
          "| next token after that, p50 / max | predicted |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r.fault} | {r.requests} | {r.lost} | {r.differing} | {r.interrupted} "
            f"| {r.placed_p50_s:.2f} / {r.placed_max_s:.2f} s "
            f"| {1e3 * r.next_token_p50_s:.0f} / {1e3 * r.next_token_max_s:.0f} ms "
            f"| {1e3 * r.predicted_p50_s:.0f} ms |"
        )


if __name__ == "__main__":
    main()
