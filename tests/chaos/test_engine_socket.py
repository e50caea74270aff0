"""Whatever comes in at an engine's socket, the engine lives and its service is served."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from penstock.protocol.codec import PROTOCOL_VERSION, Message, decode, encode
from penstock.protocol.instance import Assign, Attach, Attached, Detach, Probe, Probed, Resync
from penstock.protocol.kv import Refused
from penstock.protocol.request import Cancel, Constraint, SamplingParams, Submit
from penstock.protocol.tokens import Credit, Tokens
from tests.chaos.test_attacks import FLAGS, complete, look_after, settle
from tests.helpers.server import Server, environment, penstock, running


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[Server]:
    with running(checkpoint, *FLAGS) as server:
        yield server


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from look_after(request)


def address(server: Server) -> str:
    line = server.engine().cmdline()
    return line[line.index("--address") + 1]


class Rogue:
    """A peer that says what it likes under any name."""

    def __init__(self, address: str, name: bytes = b"rogue") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if name:
            self._socket.setsockopt(zmq.IDENTITY, name)
        self._socket.connect(address)

    def __enter__(self) -> Rogue:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def say(self, *what: bytes | Message) -> None:
        for each in what:
            self._socket.send(each if isinstance(each, bytes) else encode(each))

    def parts(self, *parts: bytes) -> None:
        self._socket.send_multipart(list(parts))

    def hear(self, kind: type[Any], timeout_s: float = 10.0) -> Any:
        """The next message of a kind."""
        deadline_s = time.monotonic() + timeout_s
        while self._socket.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            message = decode(self._socket.recv())
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__}")

    def attach(self, name: str = "rogue", incarnation: int = 1) -> Attached:
        self.say(Attach(name, incarnation, PROTOCOL_VERSION))
        found = self.hear(Attached)
        assert isinstance(found, Attached)
        return found


def submit(request_id: str = "r", **more: Any) -> Submit:
    fields: dict[str, Any] = {
        "attempt": 1, "service": "rogue", "service_incarnation": 1, "prompt_ids": [5, 6, 7],
        "sampling": SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
    } | more  # fmt: skip
    return Submit(request_id=request_id, **fields)


def test_frames_that_are_no_messages(server: Server) -> None:
    whole = encode(submit())
    dice = random.Random(3)
    with Rogue(address(server)) as rogue:
        rogue.attach()
        rogue.say(
            b"", b"\x01", b"\x02\x00", b"\xff" * 40, b"\x01\x07abc", b"\x01\x00" + b"\x91" * 9000
        )
        rogue.parts(b"", b"")
        rogue.parts(*[b"x"] * 100)
        rogue.say(*(whole[:i] for i in range(len(whole))))
        for _ in range(500):
            damaged = bytearray(whole)
            for _ in range(dice.randrange(1, 4)):
                damaged[dice.randrange(2, len(damaged))] = dice.randrange(256)
            rogue.say(bytes(damaged))
        rogue.say(encode(Probe(7)))
        assert rogue.hear(Probed).nonce == 7
        rogue.say(Detach("rogue", 1))


def test_another_version_is_refused_with_the_reason(server: Server) -> None:
    with Rogue(address(server)) as rogue:
        rogue.say(Attach("rogue", 1, PROTOCOL_VERSION + 1))
        refused = rogue.hear(Refused)
        assert refused.code == "version_mismatch" and "release" in refused.reason
        rogue.say(bytes([PROTOCOL_VERSION + 1]) + encode(Probe(1))[1:], Probe(2))
        assert rogue.hear(Probed).nonce == 2


def test_who_has_not_attached_is_told_so(server: Server) -> None:
    for name in (b"stranger", b"", b"\xff\xfe name", b"x" * 255):
        with Rogue(address(server), name) as rogue:
            rogue.say(Cancel("nothing", 1), Credit(99), Detach("rogue", 1), submit())
            assert rogue.hear(Refused).code == "not_attached"
            rogue.say(Resync())
            assert rogue.hear(Refused).code == "not_attached"


BAD_SUBMITS: dict[str, dict[str, Any]] = {
    "no prompt": {"prompt_ids": []},
    "negative id": {"prompt_ids": [-1, 5]},
    "id beyond the vocabulary": {"prompt_ids": [5, 10**6]},
    "id beyond 64 bits": {"prompt_ids": [5, 2**63]},
    "resumed id beyond the vocabulary": {"resumed_ids": [10**6]},
    "too long": {"prompt_ids": [5] * 600},
    "too long with what was resumed": {"prompt_ids": [5] * 500, "resumed_ids": [5] * 100},
    "no tokens wanted": {"sampling": SamplingParams(max_tokens=0)},
    "negative tokens": {"sampling": SamplingParams(max_tokens=-3)},
    "all was generated": {"resumed_ids": [5, 5, 5], "sampling": SamplingParams(max_tokens=3)},
    "temperature": {"sampling": SamplingParams(max_tokens=4, temperature=-1.0)},
    "nan": {"sampling": SamplingParams(max_tokens=4, temperature=float("nan"))},
    "top_p": {"sampling": SamplingParams(max_tokens=4, temperature=1.0, top_p=7.0)},
    "top_k": {"sampling": SamplingParams(max_tokens=4, temperature=1.0, top_k=-9)},
    "logprobs": {"sampling": SamplingParams(max_tokens=4, logprobs=10**6)},
    "negative logprobs": {"sampling": SamplingParams(max_tokens=4, logprobs=-2)},
    "bias": {"sampling": SamplingParams(max_tokens=4, logit_bias={10**7: 1.0, -5: 1.0})},
    "infinite bias": {"sampling": SamplingParams(max_tokens=4, logit_bias={7: float("inf")})},
    "stop ids": {
        "sampling": SamplingParams(max_tokens=4, stop_token_ids=[10**9, -1], min_tokens=2)
    },
    "repetition": {"sampling": SamplingParams(max_tokens=4, repetition_penalty=0.0)},
    "seed": {"sampling": SamplingParams(max_tokens=4, temperature=1.0, seed=2**63)},
    "negative seed": {"sampling": SamplingParams(max_tokens=4, temperature=1.0, seed=-1)},
    "schema": {"constraint": Constraint("json_schema", "{")},
    "grammar": {"constraint": Constraint("lark", "\0")},
    "keys": {"block_keys": b"\x01" * 7},
    "more keys than blocks": {"block_keys": b"\x01" * 16 * 500},
    "budget": {"total_budget_s": -1.0},
    "nan budget": {"total_budget_s": float("nan")},
    "choice": {"choice": -(2**62)},
    "priority": {"priority": 2**62},
}


@pytest.mark.parametrize("kind", BAD_SUBMITS)
def test_submits_that_no_service_of_ours_would_send(server: Server, kind: str) -> None:
    """Each ends with tokens or an error, and takes nobody else down."""
    with Rogue(address(server)) as rogue:
        rogue.attach()
        rogue.say(submit(**BAD_SUBMITS[kind]))
        while True:
            row = rogue.hear(Tokens).rows[-1]
            if row.finish is not None:
                break
        assert row.finish == "length" or (row.finish == "error" and row.error.message)
        rogue.say(Detach("rogue", 1))


def test_a_crowd_of_peers_that_come_and_go(server: Server) -> None:
    engine = server.engine()
    before = engine.num_fds()
    for i in range(60):
        with Rogue(address(server), b"peer-%d" % i) as rogue:
            rogue.attach(f"peer-{i}")
            rogue.say(submit(service=f"peer-{i}", sampling=SamplingParams(max_tokens=400)))
    # Their sequences are freed, without anybody's cancel.
    settle(server)
    assert engine.num_fds() <= before + 4


def test_a_peer_that_never_reads(server: Server) -> None:
    with Rogue(address(server)) as rogue:
        rogue.attach()
        long = SamplingParams(max_tokens=490, temperature=0.0, ignore_eos=True)
        rogue.say(*(submit(f"r{i}", sampling=long) for i in range(64)))
        for _ in range(3):
            assert asyncio.run(complete(server.port)) == "length"
    settle(server)


def test_stale_and_future_epochs(server: Server) -> None:
    with Rogue(address(server)) as rogue:
        rogue.say(Assign("any", 0))
        assert rogue.hear(Refused).code == "stale_epoch"


# --- the service's own name ----------------------------------------------------------------------


@pytest.fixture
def by_hand(checkpoint: str, tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """A service attached to a worker that is not its own, which it could kill and start again."""
    where = f"ipc://{tmp_path}/engine.sock"
    worker = start_worker(checkpoint, where)
    try:
        with running(checkpoint, "--engine-address", where, "--served-model-name", "m") as server:
            yield server, where
            assert asyncio.run(complete(server.port)) == "length", server.log[-2000:]
            settle(server)
            assert "Traceback" not in server.log, server.log[-2000:]
        assert worker.poll() is None
    finally:
        worker.terminate()
        worker.wait(10)


def start_worker(checkpoint: str, where: str) -> subprocess.Popen[bytes]:
    command = penstock("worker", checkpoint, "--address", where, "--dtype", "float32",
                       "--kv-cache-memory-bytes", "32M")  # fmt: skip
    return subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL)


@pytest.mark.slow
async def test_somebody_takes_the_services_name(by_hand: tuple[Server, str]) -> None:
    """Requests under way end with tokens or an error, and the service has its name back as soon as
    the other lets go of it."""
    server, where = by_hand
    running_ones = [
        asyncio.create_task(complete(server.port, max_tokens=450, n=4, prompt=[i + 5] * 20))
        for i in range(4)
    ]
    await asyncio.sleep(0.1)
    with Rogue(where, service_name(server).encode()) as rogue:
        for i in range(20):
            rogue.say(Probe(i), Cancel("x", 1), Credit(10**9), Resync())
            await asyncio.sleep(0.05)
    assert {await task for task in running_ones} <= {"length", "engine_unavailable"}


@pytest.mark.slow
async def test_somebody_detaches_the_service(by_hand: tuple[Server, str]) -> None:
    """The engine forgets it and what it asked for; it attaches again, and goes on from the
    journal. Token messages are numbered from one again then."""
    server, where = by_hand
    name = service_name(server)
    with Rogue(where, name.encode()) as rogue:
        # Attaching with an older incarnation is refused, and the reason has the number.
        rogue.say(Attach(name, 1, PROTOCOL_VERSION))
        incarnation = int(rogue.hear(Refused).reason.split()[1])
    await asyncio.to_thread(server.wait_ready)
    long = asyncio.create_task(complete(server.port, max_tokens=480, n=8))
    while not server.metric("penstock:num_requests_running"):
        await asyncio.sleep(0.01)
    with Rogue(where, name.encode()) as rogue:
        rogue.say(Detach(name, incarnation), Probe(1))
        rogue.hear(Probed)
    assert await long == "length"


def service_name(server: Server) -> str:
    return f"{socket.gethostname()}-{server.process.pid}"


@pytest.mark.slow
async def test_a_worker_started_by_hand_dies_and_is_started_again(
    checkpoint: str, tmp_path: Path
) -> None:
    """With the same command line, so with the same incarnation."""
    where = f"ipc://{tmp_path}/engine.sock"
    worker = start_worker(checkpoint, where)
    try:
        flags = ("--engine-address", where, "--served-model-name", "m")
        with running(checkpoint, *flags) as server:
            assert await complete(server.port, max_tokens=450) == "length"
            worker.kill()
            worker.wait()
            deadline_s = time.monotonic() + 60.0
            while httpx.get(f"{server.url}/health").status_code == 200:  # it has not heard of it
                assert time.monotonic() < deadline_s, server.log
                time.sleep(0.05)
            worker = start_worker(checkpoint, where)
            server.wait_ready()
            assert await complete(server.port, max_tokens=50) == "length"
    finally:
        worker.terminate()
        worker.wait(10)


def test_what_the_protocol_can_say_its_codec_can_carry() -> None:
    message = decode(encode(submit(priority=2**62)))
    assert isinstance(message, Submit) and message.priority == 2**62
    with pytest.raises(OverflowError):
        encode(submit(priority=2**70))
