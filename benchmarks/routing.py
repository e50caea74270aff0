"""What a routing decision costs: index lookup, view and policy, for a long prompt in a full index.

    python -m benchmarks.routing [--tokens 100000] [--instances 64] [--blocks 1000000]

The structures are the service's own, fed by the messages that engines send. Tokenizing and hashing
come before and are reported beside. The prompt is held in full by some instances, in part by
others, in tiers; between decisions events arrive, so that nothing is answered from a memo.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from penstock.checkpoint import resolve
from penstock.protocol.instance import CostModel, InstanceCard, Load
from penstock.protocol.kv import (
    BLOCK_TOKENS,
    KEY_BYTES,
    KvChange,
    KvEvents,
    KvLayout,
    block_keys,
    root_key,
)
from penstock.service.cluster.instances import Instance
from penstock.service.cluster.view import LiveView
from penstock.service.kv_index.index import KvIndex
from penstock.service.policies.routing import POLICIES, RouteRequest
from penstock.service.text.tokenizer import Tokenizer


def instances(count: int, rng: np.random.Generator) -> list[Instance]:
    """Active ones, each with a card and a heartbeat."""
    return [_instance(f"engine-{n}", n, rng) for n in range(count)]


def _instance(name: str, number: int, rng: np.random.Generator) -> Instance:
    cost = CostModel(2e-3, 2e-5, 1e-4, 1e-8, 1e-10, residual_s=1e-4, num_steps=1000)
    card = InstanceCard(
        name=name,
        incarnation=1,
        pid=number,
        model="m",
        model_digest="m",
        vocab_size=1000,
        max_model_len=131072,
        dtype="bfloat16",
        device="cpu",
        layout=KvLayout(1, 1, 8, BLOCK_TOKENS, "bfloat16", 1024),
        num_blocks=20_000,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        host=f"host-{number // 8}",
        cost=cost,
    )
    load = Load(
        instance=name,
        incarnation=1,
        number=1,
        step=1,
        step_end_in_s=0.01,
        waiting={"online": 2},
        running={"online": int(rng.integers(1, 60))},
        waiting_tokens=int(rng.integers(0, 20_000)),
        running_tokens=int(rng.integers(0, 100_000)),
        kv_blocks_used=int(rng.integers(0, 9_000)),
        kv_blocks_cached=8_000,
        kv_blocks_total=20_000,
        preemptions=0,
        prefix_hit_tokens=0,
        prefix_query_tokens=0,
        steps=1000,
        cost=cost,
    )
    instance = Instance(name)
    instance.attached(card, 0.0)
    instance.load = load
    return instance


def filled_index(
    names: list[str], num_blocks: int, keys: bytes, rng: np.random.Generator
) -> KvIndex:
    """`num_blocks` different blocks over the instances; of the prompt each holds another part."""
    index = KvIndex(capacity=num_blocks + len(keys) // KEY_BYTES)
    each = num_blocks // len(names)
    for n, name in enumerate(names):
        held = len(keys) // KEY_BYTES * n // (len(names) - 1) if len(names) > 1 else 0
        on_device = held if n % 3 else held // 2
        tiers = {
            "device": keys[: on_device * KEY_BYTES] + rng.bytes(each * KEY_BYTES),
            "host": keys[on_device * KEY_BYTES : held * KEY_BYTES],
        }
        index.replace(name, 1, 0, tiers)  # type: ignore[arg-type]
    return index


def milliseconds(call: Callable[[], object], repeats: int) -> np.ndarray:
    out = np.empty(repeats)
    for i in range(repeats):
        started_s = time.perf_counter()
        call()
        out[i] = 1e3 * (time.perf_counter() - started_s)
    return out


def percentiles(times_ms: np.ndarray) -> dict[str, float]:
    p50, p99 = np.percentile(times_ms, [50, 99])
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4)}


def text_of(tokenizer: Tokenizer, num_tokens: int) -> str:
    """Words with a few tokens each, cut so that there are about `num_tokens`."""
    line = "It was a bright cold day in April, and the clocks were striking thirteen. "
    return line * max(1, num_tokens // len(tokenizer.encode(line)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--many", type=int, default=1000, help="instances for the policy alone")
    parser.add_argument("--policies", nargs="+", default=["kv-aware", "slo-aware"])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    tokenizer = Tokenizer.from_checkpoint(resolve("toy"))
    text = text_of(tokenizer, options.tokens)
    ids = [int(i) for i in rng.integers(0, 150_000, options.tokens)]
    root = root_key("m")
    keys = block_keys(root, ids)
    fleet = instances(options.instances, rng)
    names = [i.name for i in fleet]
    index = filled_index(names, options.blocks, keys, rng)
    stats = index.stats()
    result: dict[str, object] = {
        "prompt_tokens": options.tokens,
        "instances": options.instances,
        "indexed_blocks": stats.num_blocks,
        "bytes_per_block": round(stats.num_bytes / stats.num_blocks, 1),
        "tokenize": percentiles(milliseconds(lambda: tokenizer.encode(text), 5)),
        "hash": percentiles(milliseconds(lambda: block_keys(root, ids), 20)),
    }
    live = LiveView()
    number = 0

    def events() -> None:
        nonlocal number
        number += 1
        for name in names[::8]:
            changes = [KvChange("stored", rng.bytes(4 * KEY_BYTES))]
            assert index.apply(name, KvEvents(name, 1, number, changes))
        for instance in fleet[::8]:
            instance.touched = instance.has_news = True  # as by a heartbeat

    def decide(policy: str) -> None:
        view = live.of(fleet, 0.0)
        device, tiers = index.hits(keys, view.names)
        request = RouteRequest(
            num_tokens=options.tokens,
            expected_output_tokens=256,
            ttft_slo_s=2.0,
            tpot_slo_s=0.05,
            device_hits=device,
            tier_hits=tiers,
        )
        POLICIES[policy](view, request)

    for policy in options.policies:
        times = np.empty(options.repeats)
        for i in range(options.repeats):
            events()
            times[i] = milliseconds(partial(decide, policy), 1)[0]
        result[f"decision {policy}"] = percentiles(times)
    result["of it: index"] = percentiles(
        milliseconds(lambda: index.hits(keys, names), options.repeats)
    )
    result["of it: view"] = percentiles(milliseconds(lambda: live.of(fleet, 0.0), options.repeats))
    result["one event of 4 blocks"] = percentiles(milliseconds(events, 200) / len(names[::8]))
    many = LiveView().of(instances(options.many, rng), 0.0)
    hits = rng.integers(0, options.tokens, options.many).astype(float)
    request = RouteRequest(
        num_tokens=options.tokens, expected_output_tokens=256, device_hits=hits, tier_hits=hits
    )
    for policy in POLICIES:
        times = milliseconds(partial(POLICIES[policy], many, request), 10 * options.repeats)
        result[f"{policy} alone, {options.many} instances"] = percentiles(times)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for what, value in result.items():
        print(f"{what:36} {value}")


if __name__ == "__main__":
    main()
