"""What handing KV over costs, between two engines on this host.

    python -m benchmarks.handover [--tokens 1024] [--rounds 10] [--means map tcp mooncake]
    python -m benchmarks.handover --rates [--rounds 10]

The first form runs a prefill instance P and a decode instance D in processes of their own, at
Qwen3-0.6B's dimensions with random weights, speaks the service's messages to them by hand, and
prints medians, for each means:

* `fetch`: time to first token of a request on D whose prompt P has cached, less that of the same
  request on P itself (where it is a prefix hit): what getting the KV adds;
* `handover`: prefill on P and decode on D, against both on P, with prompts nobody has seen: what
  the first token takes longer, and the time from the first token to the second.

The second form compares bytes per second of whole, verified jobs with what Mooncake's own call
moves between the same two processes in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overlap import QWEN3_06B
from penstock.checkpoint import resolve
from penstock.protocol.codec import PROTOCOL_VERSION, Message, decode, encode
from penstock.protocol.instance import Attach, Attached, InstanceCard
from penstock.protocol.kv import Fetch, Fetched, KvSource, block_keys, root_key
from penstock.protocol.request import SamplingParams, Stage, Submit
from penstock.protocol.tokens import Credit, TokenRow, Tokens
from penstock.protocol.transport.open import connect

SERVICE = "benchmark"
WORKER = (
    "import sys; from penstock.engine.config import EngineConfig, WorkerConfig;"
    "from penstock.engine.instance import run_worker;"
    "from penstock.protocol import secret;"
    "secret.use(secret.ClusterSecret(b'known on this host'));"
    "config, address, name, parent = eval(sys.argv[1]);"
    "run_worker(WorkerConfig(EngineConfig(**config), address, name=name, incarnation=1,"
    " parent_pid=parent))"
)


class Engine:
    """A worker process and our connection to it."""

    def __init__(self, folder: Path, model: str, name: str, means: str, tokens: int) -> None:
        self.name, address = name, f"ipc://{folder}/{name}.sock"
        settings = {
            "model": model, "load_format": "dummy", "dtype": "bfloat16", "num_blocks": 256,
            "max_model_len": tokens + 64, "max_num_seqs": 4, "kv_transfer": means,
            "max_num_batched_tokens": 1024, "cpu_bind": "none",
        }  # fmt: skip
        arguments = repr((settings, address, name, os.getpid()))
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, arguments])
        self.endpoint = connect(address, SERVICE, name)
        self.rows: list[tuple[float, TokenRow]] = []
        self.others: list[Message] = []
        attach = encode(Attach(SERVICE, 1, PROTOCOL_VERSION))
        self.until(lambda: self.endpoint.send(name, attach))
        ENGINES.append(self)
        self.until(lambda: any(isinstance(m, Attached) for m in self.others))
        self.card: InstanceCard = next(m.card for m in self.others if isinstance(m, Attached))

    def poll(self) -> None:
        for _, frame in self.endpoint.drain():
            message = decode(frame)
            if isinstance(message, Tokens):
                now = time.perf_counter()
                self.rows += [(now, row) for row in message.rows]
                self.endpoint.send(self.name, encode(Credit(message.number)))
            else:
                self.others.append(message)
                self.endpoint.send(self.name, encode(Credit(0)))

    def until(self, condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s and self.process.poll() is None, self.name
            for engine in ENGINES:  # who is silent for seconds is taken for dead
                engine.poll()
            time.sleep(20e-6)

    def submit(self, request_id: str, prompt: list[int], **changes: Any) -> float:
        """Returns when it was sent."""
        submit = Submit(
            request_id=request_id, service=SERVICE, service_incarnation=1, prompt_ids=prompt,
            block_keys=block_keys(root_key(self.card.model_digest), prompt),
            **{"attempt": 1, "sampling": greedy(2), **changes},
        )  # fmt: skip
        sent_s = time.perf_counter()
        assert self.endpoint.send(self.name, encode(submit))
        return sent_s

    def token_times(self, request_id: str) -> list[float]:
        """When each token came; waits for the last."""
        mine: list[tuple[float, TokenRow]] = []

        def ended() -> bool:
            mine[:] = [(t, row) for t, row in self.rows if row.request_id == request_id]
            return bool(mine) and mine[-1][1].finish is not None

        self.until(ended)
        assert mine[-1][1].error is None, mine[-1][1].error
        self.token_ids = [i for _, row in mine for i in row.ids]
        return [t for t, row in mine for _ in row.ids]

    def source(self, num_tokens: int) -> KvSource:
        control = self.card.endpoints["control"]
        return KvSource(self.name, self.card.incarnation, control, num_tokens // 16)

    def close(self) -> None:
        ENGINES.remove(self)
        self.endpoint.close()
        self.process.kill()
        self.process.wait()


ENGINES: list[Engine] = []


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def make_model(folder: Path) -> str:
    path = folder / "qwen3-0.6b-dimensions"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(QWEN3_06B))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((resolve("toy").path / name).read_bytes())
    return str(path)


def measure(prefill: Engine, decode_at: Engine, tokens: int, rounds: int) -> dict[str, float]:
    rng, found = random.Random(0), dict[str, list[float]]()

    def note(what: str, seconds: float) -> None:
        found.setdefault(what, []).append(1e3 * seconds)

    for number in range(rounds + 1):  # the first warms up
        if number == 1:
            found.clear()
        prompts = [
            [rng.randrange(3, prefill.card.vocab_size) for _ in range(tokens)] for _ in range(2)
        ]
        name = f"{decode_at.name}-{number}"
        # Nobody has seen it: both here, which also leaves it in P's cache.
        sent_s = prefill.submit(f"{name}-agg", prompts[0])
        first_s, second_s = prefill.token_times(f"{name}-agg")
        note("aggregated TTFT", first_s - sent_s)
        note("aggregated 2nd token", second_s - first_s)
        # A prefix hit here, and the same over there.
        sent_s = prefill.submit(f"{name}-hit", prompts[0])
        note("hit TTFT", prefill.token_times(f"{name}-hit")[0] - sent_s)
        source = prefill.source(tokens)
        sent_s = decode_at.submit(f"{name}-fetch", prompts[0], kv_source=source)
        note("fetch TTFT", decode_at.token_times(f"{name}-fetch")[0] - sent_s)
        # Prefill here, decode there.
        plan = [Stage("prefill", prefill.name), Stage("decode", decode_at.name)]
        keys = block_keys(root_key(prefill.card.model_digest), prompts[1])
        sent_s = prefill.submit(f"{name}-pd", prompts[1], plan=plan)
        fetch = Fetch(
            request_id=f"{name}-pd", attempt=1, keys=keys, source=source,
            num_tokens=tokens + 2, lease_s=20.0,
        )  # fmt: skip
        decode_at.endpoint.send(decode_at.name, encode(fetch))
        first_s = prefill.token_times(f"{name}-pd")[-1]
        resumed = prefill.token_ids
        decode_at.submit(f"{name}-pd", prompts[1], attempt=2, resumed_ids=resumed, plan=plan[1:])
        second_s = decode_at.token_times(f"{name}-pd")[0]
        note("handover TTFT", first_s - sent_s)
        note("handover 2nd token", second_s - first_s)
    came = [m for m in decode_at.others if isinstance(m, Fetched)]
    assert all(m.num_blocks >= tokens // 16 - 1 for m in came[-2:]), came[-2:]
    medians = {what: statistics.median(values) for what, values in found.items()}
    medians["added by fetch"] = medians["fetch TTFT"] - medians["hit TTFT"]
    medians["added to TTFT"] = medians["handover TTFT"] - medians["aggregated TTFT"]
    medians["added to 2nd token"] = medians["handover 2nd token"] - medians["aggregated 2nd token"]
    return medians


def hand_over(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_model(folder) if options.model == "0.6b" else options.model
        all_means = ",".join(options.means)
        serves_tcp = "tcp" in options.means or "mooncake" in options.means
        prefill = Engine(folder, model, "P", all_means, options.tokens)
        try:
            for means in options.means:
                assert serves_tcp or means == "map"
                decode_at = Engine(folder, model, f"D-{means}", means, options.tokens)
                try:
                    found = measure(prefill, decode_at, options.tokens, options.rounds)
                finally:
                    decode_at.close()
                print(f"{means}: {options.tokens} tokens, medians of {options.rounds}, ms")
                for what, value in found.items():
                    print(f"    {what:20} {value:9.2f}")
        finally:
            prefill.close()


# --- rates ------------------------------------------------------------------------------------

NUM_BLOCKS = 64


def data_plane(means: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    from penstock.engine.memory.sizing import kv_layout
    from penstock.engine.memory.xtensor import XTensorMemory
    from penstock.engine.transfer.mover import DataPlane, MoverConfig
    from penstock.engine.transfer.pages import PoolHeader, PoolIdentity

    memory = XTensorMemory(kv_layout(28, 8, 128, "bfloat16"), NUM_BLOCKS, 1, NUM_BLOCKS)
    layout = memory.layout
    identity = PoolIdentity(layout.digest(), 1, NUM_BLOCKS, memory.block_stride_bytes)
    header = PoolHeader(identity)
    plane = DataPlane(memory, header, MoverConfig(means))
    plane.offer(key_of)
    return memory, header, plane


SECRET = b"of no cluster"
KEY = bytes(16)


def key_of(block: int) -> bytes | None:
    return KEY


def as_if_elsewhere(_: object) -> bool:
    return True


def serve_blocks() -> None:
    """The owner's process: says where its blocks are, and waits to be ended."""
    from penstock.engine.transfer.server import BlockServer, Served

    memory, header, plane = data_plane(("mooncake", "tcp"))
    memory.bytes[:] = np.random.default_rng(0).integers(0, 255, memory.bytes.shape, np.uint8)
    served = Served(memory.block_bytes, header.generations, 1, memory.layout.block_bytes, key_of)
    sealed = BlockServer(served, secret=SECRET, is_sealed=as_if_elsewhere)
    print(json.dumps({**plane.endpoints, "tcp sealed": sealed.endpoint}), flush=True)
    sys.stdin.read()


def sealed_fetch(endpoint: str, memory: Any) -> Callable[[list[Any]], list[bool]]:
    """As between hosts, over loopback."""
    from penstock.engine.transfer.tcp import Connection, Expected

    began_s = time.perf_counter()
    expected = Expected(1, memory.layout.block_bytes)
    connection = Connection(endpoint, expected, SECRET, as_if_elsewhere)
    print(f"connecting and sealing took {1e3 * (time.perf_counter() - began_s):.1f} ms")

    def fetch(handles: list[Any]) -> list[bool]:
        came = [False] * len(handles)
        blocks = [(handle, memory.block_bytes(i)) for i, handle in enumerate(handles)]
        connection.fetch(blocks, came)
        return came

    return fetch


def rates(options: argparse.Namespace) -> None:
    from queue import SimpleQueue

    from penstock.engine.transfer.jobs import Import, Incoming, Moved, Peer
    from penstock.engine.transfer.mooncake import MooncakeEndpoint
    from penstock.protocol.kv import BlockHandle

    command = [sys.executable, "-m", "benchmarks.handover", "--serve-blocks"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as owner:
        assert owner.stdout is not None
        endpoints = json.loads(owner.stdout.readline())
        memory, _, plane = data_plane(("mooncake", "tcp"))
        size = memory.layout.block_bytes
        target = np.empty((NUM_BLOCKS, size), np.uint8)
        engine = plane._mooncake._engine
        engine.register_memory(target.ctypes.data, target.nbytes)
        at = MooncakeEndpoint.parse(endpoints["mooncake"])
        fetch_sealed = sealed_fetch(endpoints["tcp sealed"], memory)
        found: dict[str, list[float]] = {
            "mooncake raw": [], "mooncake": [], "tcp": [], "tcp sealed": []
        }  # fmt: skip
        for number in range(options.rounds + 1):
            here = [int(row.ctypes.data) for row in target]
            there = [at.base + i * at.stride for i in range(NUM_BLOCKS)]
            began_s = time.perf_counter()
            status = engine.batch_transfer_sync_read(at.session, here, there, [size] * NUM_BLOCKS)
            found["mooncake raw"].append(time.perf_counter() - began_s)
            assert status == 0
            for means in ("mooncake", "tcp"):
                handles = [BlockHandle(i, 0, KEY) for i in range(NUM_BLOCKS)]
                incoming = tuple(Incoming(handle, i) for i, handle in enumerate(handles))
                ended: SimpleQueue[Moved] = SimpleQueue()
                began_s = time.perf_counter()
                peer = Peer("owner", 1, means, endpoints[means])  # type: ignore[arg-type]
                plane.start(Import(number, peer, incoming), ended.put)
                moved = ended.get(timeout=60)
                found[means].append(time.perf_counter() - began_s)
                assert all(moved.ok), moved.reason
            began_s = time.perf_counter()
            assert all(fetch_sealed(handles))
            found["tcp sealed"].append(time.perf_counter() - began_s)
        num_bytes = NUM_BLOCKS * size
        print(f"{NUM_BLOCKS} blocks of {size} bytes, medians of {options.rounds}")
        raw_s = statistics.median(found["mooncake raw"][1:])
        for means, seconds in found.items():
            median_s = statistics.median(seconds[1:])
            rate = num_bytes / median_s / 1e9
            print(f"    {means:14} {rate:6.2f} GB/s   {raw_s / median_s:6.1%} of Mooncake's own")
        plane.close()
        memory.close()
        owner.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--model", default="0.6b", help="or `toy`, to try it out")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--means", nargs="+", default=["map", "tcp"])
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--serve-blocks", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_blocks:
        serve_blocks()
    elif options.rates:
        rates(options)
    else:
        hand_over(options)


if __name__ == "__main__":
    main()
