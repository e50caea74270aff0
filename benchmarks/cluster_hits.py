"""Whether the cache hits that the service predicts are those that the cluster has.

    python -m benchmarks.cluster_hits [--requests 600] [--blocks 2000] [--json FILE]

A slice of Mooncake's conversation trace goes to real processes (`penstock serve --instances 3`).
Each of the trace's 512-token blocks becomes one of 16 tokens drawn from its hash id alone: prompts
are 32 times shorter, what they share is the same. One more token stands behind them for the
question, so that every block can be found. For each policy, one request after the other and then
several at a time:

- predicted: cached tokens as the service's index had them when it chose the instance (explain);
- actual: as the engine counted them (usage.prompt_tokens_details.cached_tokens);
- differing: requests in which the two differ, and by how many blocks in all;
- replay: a plain LRU for each instance, given the requests that went there, in that order;
- ceiling: one plain LRU with the room of all instances together.
"""

from __future__ import annotations

import benchmarks.dev_packages  # noqa: F401  says what is missing

# isort: split
import argparse
import asyncio
import gzip
import json
import random
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.cluster import instances, settle, wait_for
from tests.helpers.server import Server, running

TRACE = Path(__file__).parents[1] / "tests" / "data" / "mooncake_slice.jsonl.gz"
BLOCK_TOKENS = 16
#: The tokenizer of the test checkpoints has text for all ids below this.
VOCAB_SIZE = 384
#: Positions of the checkpoint: prompts beyond are left out, and counted.
MAX_MODEL_LEN = 4096
FLAGS = (
    "--dtype", "float32", "--served-model-name", "m", "--num-threads", "1",
    "--log-level", "warning",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what became of it."""

    hash_ids: list[int]
    request_id: str
    instance: str
    placed_s: float
    ttft_s: float
    #: None where the policy knows nothing of caches.
    predicted_tokens: int | None
    actual_tokens: int
    #: From which instance blocks were to be fetched, if from any.
    source: str | None
    #: How often it was placed.
    placements: int


@dataclass(frozen=True, slots=True)
class Row:
    policy: str
    at_once: int
    requests: int
    left_out: int
    query_blocks: int
    predicted_blocks: int | None
    actual_blocks: int
    #: Requests whose prediction was too high or too low, and the blocks missing or too many.
    too_high: int
    too_high_blocks: int
    too_low: int
    too_low_blocks: int
    fetched_from_peers: int
    replay_blocks: int
    ceiling_blocks: int
    mean_ttft_s: float

    @property
    def hit_rate(self) -> float:
        return self.actual_blocks / self.query_blocks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.cluster_hits", description=__doc__)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--blocks", type=int, default=2000, help="of each instance's cache")
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    trace = read_trace(options.requests)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, "qwen3", max_position_embeddings=MAX_MODEL_LEN)
        for policy in ("kv-aware", "least-load"):
            for at_once in (1, options.at_once):
                rows.append(
                    measure(folder, trace, policy, at_once, options.instances, options.blocks)
                )
    print_table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_trace(num_requests: int) -> list[list[int]]:
    with gzip.open(TRACE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    ids = [row["hash_ids"] if isinstance(row, dict) else row for row in rows]
    return ids[:num_requests]


def prompt_of(hash_ids: Sequence[int]) -> list[int]:
    """16 tokens for each id, the same wherever it stands, and one token behind them."""
    ids = []
    for hash_id in hash_ids:
        ids += random.Random(hash_id).choices(range(5, VOCAB_SIZE), k=BLOCK_TOKENS)
    return [*ids, 5]


def measure(
    model: str, trace: list[list[int]], policy: str, at_once: int, num_instances: int, blocks: int
) -> Row:
    """One fresh cluster, the whole trace."""
    fits = [ids for ids in trace if len(ids) * BLOCK_TOKENS + 2 <= MAX_MODEL_LEN]
    with running(
        model, *FLAGS, "--policy", policy, "--instances", str(num_instances),
        "--num-gpu-blocks-override", str(blocks),
    ) as server:  # fmt: skip
        all_active(server, num_instances)
        asked = asyncio.run(ask_all(server.url, fits, at_once))
        settle(server)
        rooms = {name: i["kv"]["total"] for name, i in instances(server.url).items()}
    return summarize(asked, policy, at_once, len(trace) - len(fits), rooms)


def summarize(
    asked: list[Asked], policy: str, at_once: int, left_out: int, rooms: dict[str, int]
) -> Row:
    known = [a for a in asked if a.predicted_tokens is not None]
    off = [(a.predicted_tokens or 0) - a.actual_tokens for a in known]
    high, low = [o for o in off if o > 0], [-o for o in off if o < 0]
    replay = 0
    for name, room in rooms.items():
        there = sorted((a for a in asked if a.instance == name), key=lambda a: a.placed_s)
        replay += plain_lru_hits([a.hash_ids for a in there], room)
    predicted = sum(a.predicted_tokens or 0 for a in known) // BLOCK_TOKENS if known else None
    return Row(
        policy=policy,
        at_once=at_once,
        requests=len(asked),
        left_out=left_out,
        query_blocks=sum(len(a.hash_ids) for a in asked),
        predicted_blocks=predicted,
        actual_blocks=sum(a.actual_tokens for a in asked) // BLOCK_TOKENS,
        too_high=len(high),
        too_high_blocks=sum(high) // BLOCK_TOKENS,
        too_low=len(low),
        too_low_blocks=sum(low) // BLOCK_TOKENS,
        fetched_from_peers=sum(a.source is not None for a in asked),
        replay_blocks=replay,
        ceiling_blocks=plain_lru_hits([a.hash_ids for a in asked], sum(rooms.values())),
        mean_ttft_s=statistics.mean(a.ttft_s for a in asked),
    )


def plain_lru_hits(trace: list[list[int]], capacity: int) -> int:
    """Blocks found by a list that knows nothing of chains. A request touches its blocks from the
    last to the first."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for ids in trace:
        hits += sum(block_id in cache for block_id in ids)
        for block_id in reversed(ids):
            cache[block_id] = None
            cache.move_to_end(block_id)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


async def ask_all(url: str, trace: list[list[int]], at_once: int) -> list[Asked]:
    """In order; a new one goes as soon as fewer than `at_once` are under way."""
    waiting = list(enumerate(trace))[::-1]
    done: dict[int, Asked] = {}
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:

        async def ask_some() -> None:
            while waiting:
                number, hash_ids = waiting.pop()
                done[number] = await _ask(client, hash_ids)

        await asyncio.gather(*(ask_some() for _ in range(at_once)))
    return [done[i] for i in range(len(trace))]


async def _ask(client: httpx.AsyncClient, hash_ids: list[int]) -> Asked:
    """One token is asked for: with it the answer is whole, and its time is the TTFT."""
    data = {
        "model": "m", "prompt": prompt_of(hash_ids), "max_tokens": 1, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    started_s = time.monotonic()
    answer = await client.post("/v1/completions", json=data)
    ended_s = time.monotonic()
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    explained = (await client.get(f"/admin/requests/{found['id']}/explain")).json()
    choice = explained["prompts"][0]["choices"][0]
    last = choice["placements"][-1]
    return Asked(
        hash_ids=hash_ids,
        request_id=found["id"],
        instance=last["instance"],
        placed_s=started_s + last["at_s"],
        ttft_s=ended_s - started_s,
        predicted_tokens=last["predicted_cached_tokens"],
        actual_tokens=found["usage"]["prompt_tokens_details"]["cached_tokens"],
        source=last["source"],
        placements=len(choice["placements"]),
    )


def all_active(server: Server, num_instances: int) -> None:
    """Wait until so many instances take work."""

    def active() -> bool:
        states = [i["state"] for i in instances(server.url).values()]
        return states.count("active") == num_instances

    wait_for(active, 60.0, "all instances")


def print_table(rows: list[Row]) -> None:
    left_out = rows[0].left_out if rows else 0
    print(f"hit blocks of {rows[0].query_blocks} in {rows[0].requests} requests; {left_out} longer")
    print("| policy | at once | predicted | actual | hit rate | too high | too low | from peers "
          "| replay | ceiling | mean TTFT |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        predicted = "-" if r.predicted_blocks is None else str(r.predicted_blocks)
        print(
            f"| {r.policy} | {r.at_once} | {predicted} | {r.actual_blocks} | {r.hit_rate:.2%} "
            f"| {r.too_high} ({r.too_high_blocks}) | {r.too_low} ({r.too_low_blocks}) "
            f"| {r.fetched_from_peers} | {r.replay_blocks} | {r.ceiling_blocks} "
            f"| {1e3 * r.mean_ttft_s:.1f} ms |"
        )


if __name__ == "__main__":
    main()
