"""What services and instances may rely on, whatever carries their frames."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.protocol import codec
from penstock.protocol.errors import ConfigError, ProtocolError
from penstock.protocol.instance import Probe
from penstock.protocol.transport import memory
from penstock.protocol.transport import zmq as over_zmq
from penstock.protocol.transport.base import MAX_FRAME_BYTES, Endpoint
from penstock.protocol.transport.open import connect as open_connect
from penstock.protocol.transport.open import listen as open_listen

#: How long a test waits for what must come; nothing is measured by it.
PATIENCE_S = 20.0
_numbers = itertools.count()


class Wire:
    """Makes endpoints of one kind and closes what a test leaves open."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self._folder = folder
        self._open: list[Endpoint] = []

    def address(self) -> str:
        number = next(_numbers)
        return {
            "memory": f"memory://{self._folder.name}-{number}",
            "ipc": f"ipc://{self._folder}/{number}",
            "tcp": "tcp://127.0.0.1:0",
        }[self.kind]

    def listen(self, address: str | None = None, name: str = "engine", **options: int) -> Endpoint:
        module = memory if self.kind == "memory" else over_zmq
        endpoint = module.listen(address or self.address(), name, **options)
        self._open.append(endpoint)
        return endpoint

    def connect(
        self, address: str, name: str = "service", peer: str = "engine", **options: int
    ) -> Endpoint:
        module = memory if self.kind == "memory" else over_zmq
        endpoint = module.connect(address, name, peer, **options)
        self._open.append(endpoint)
        return endpoint

    def pair(self, **options: int) -> tuple[Endpoint, Endpoint]:
        engine = self.listen(**options)
        service = self.connect(engine.address, **options)
        send(service, "engine", b"hello")
        assert receive(engine) == ("service", b"hello")
        return engine, service

    def close(self) -> None:
        for endpoint in self._open:
            endpoint.close()


@pytest.fixture(params=["memory", "ipc", "tcp"])
def wire(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Wire]:
    made = Wire(request.param, tmp_path_factory.mktemp("t"))
    yield made
    made.close()


def send(endpoint: Endpoint, peer: str, frame: bytes) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not endpoint.send(peer, frame):
        assert time.monotonic() < deadline_s, f"{peer} never took a frame"
        time.sleep(0.002)


def receive(endpoint: Endpoint) -> tuple[str, bytes]:
    """Waits on the descriptor alone, so that a wake-up that fails to come is a failure here."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        readable, _, _ = select.select([endpoint.fileno()], [], [], PATIENCE_S)
        assert readable, "nothing became readable"
        got = endpoint.receive()
        if got is not None:
            return got
        assert time.monotonic() < deadline_s, "readable for ever, and nothing to receive"


def reach(service: Endpoint, engine: Endpoint) -> None:
    """Send until something arrives: a frame sent while a connection ends may be lost."""
    deadline_s = time.monotonic() + PATIENCE_S
    while engine.receive() is None:
        assert time.monotonic() < deadline_s, "the engine was never reached"
        service.send(engine.name, b"are you there?")
        time.sleep(0.01)
    time.sleep(0.05)
    while engine.receive() is not None:
        pass


def is_silent(endpoint: Endpoint, for_s: float = 0.2) -> bool:
    deadline_s = time.monotonic() + for_s
    while time.monotonic() < deadline_s:
        if endpoint.receive() is not None:
            return False
        time.sleep(0.01)
    return True


def test_both_directions(wire: Wire) -> None:
    engine, service = wire.pair()
    send(engine, "service", b"welcome")
    assert receive(service) == ("engine", b"welcome")
    assert engine.receive() is None
    assert service.receive() is None


def test_order_is_kept_for_each_peer(wire: Wire) -> None:
    engine = wire.listen()
    services = [wire.connect(engine.address, f"service-{i}") for i in range(3)]
    for number in range(200):
        for service in services:
            send(service, "engine", str(number).encode())
    got: dict[str, list[int]] = {service.name: [] for service in services}
    for _ in range(600):
        sender, frame = receive(engine)
        got[sender].append(int(frame))
    assert all(numbers == list(range(200)) for numbers in got.values())


def test_large_and_empty_frames(wire: Wire) -> None:
    engine, service = wire.pair()
    large = os.urandom(1 << 20) * 24
    for frame in (large, b"", b"\0", large[:1_000_003]):
        send(service, "engine", frame)
        assert receive(engine) == ("service", frame)
        send(engine, "service", frame)
        assert receive(service) == ("engine", frame)


def test_a_frame_over_the_limit_is_refused_by_the_sender(wire: Wire) -> None:
    _, service = wire.pair()
    with pytest.raises(ProtocolError, match="over the limit"):
        service.send("engine", bytes(MAX_FRAME_BYTES + 1))


def test_unknown_peer(wire: Wire) -> None:
    engine, service = wire.pair()
    assert not engine.send("nobody", b"x")
    assert not service.send("nobody", b"x")
    send(engine, "service", b"still there")
    assert receive(service) == ("engine", b"still there")


def test_before_the_instance_listens(wire: Wire) -> None:
    if wire.kind == "tcp":
        # Port 0 picks a port, so find one that is free first.
        first = wire.listen()
        address = first.address
        first.close()
    else:
        address = wire.address()
    service = wire.connect(address)
    assert not service.send("engine", b"too early")
    engine = wire.listen(address)
    send(service, "engine", b"now")
    assert receive(engine) == ("service", b"now")


def test_many_peers(wire: Wire) -> None:
    engine = wire.listen()
    services = {f"service-{i}": wire.connect(engine.address, f"service-{i}") for i in range(60)}
    for name, service in services.items():
        send(service, "engine", name.encode())
    greeted = dict(receive(engine) for _ in services)
    assert greeted == {name: name.encode() for name in services}
    for name in services:
        send(engine, name, f"to {name}".encode())
    for name, service in services.items():
        assert receive(service) == ("engine", f"to {name}".encode())


def test_a_full_queue_refuses_and_does_not_block(wire: Wire) -> None:
    engine, service = wire.pair(high_water_frames=8)
    frame = bytes(1 << 20)
    # The kernel's buffers come on top of the queues, so the count is not exact.
    num_sent = 0
    while num_sent < 4000 and service.send("engine", frame):
        num_sent += 1
    assert 4 <= num_sent < 4000
    for _ in range(num_sent):
        assert receive(engine) == ("service", frame)
    send(service, "engine", b"room again")
    assert receive(engine) == ("service", b"room again")


def test_a_slow_peer_does_not_stall_another(wire: Wire) -> None:
    engine = wire.listen(high_water_frames=8)
    slow = wire.connect(engine.address, "slow", high_water_frames=8)
    quick = wire.connect(engine.address, "quick", high_water_frames=8)
    for service in (slow, quick):
        send(service, "engine", b"hello")
        receive(engine)
    while engine.send("slow", bytes(1 << 20)):
        pass
    send(engine, "quick", b"for you")
    assert receive(quick) == ("engine", b"for you")


def test_the_descriptor_stays_readable_while_frames_wait(wire: Wire) -> None:
    """Level-triggered: whoever takes one frame a turn is woken for the next one."""
    engine, service = wire.pair()
    for number in range(50):
        send(service, "engine", str(number).encode())
    got = []
    while len(got) < 50:
        got += [int(frame) for _, frame in itertools.islice(engine.drain(limit=1), 1)]
        if len(got) < 50:
            assert select.select([engine.fileno()], [], [], PATIENCE_S)[0]
    assert got == list(range(50))
    assert select.select([engine.fileno()], [], [], 0.05)[0] == []


def test_a_send_does_not_swallow_the_wake_up(wire: Wire) -> None:
    """Frames that arrive while this side only sends are announced all the same."""
    engine, service = wire.pair()
    for turn in range(200):
        send(service, "engine", str(turn).encode())
        for _ in range(3):
            send(engine, "service", b"chatter")
        assert receive(engine) == ("service", str(turn).encode())
        for _ in range(3):
            assert receive(service) == ("engine", b"chatter")


def test_drain_ends_when_nothing_waits(wire: Wire) -> None:
    engine, service = wire.pair()
    send(service, "engine", b"a")
    send(service, "engine", b"b")
    first = receive(engine)
    rest: list[tuple[str, bytes]] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while not rest and time.monotonic() < deadline_s:
        rest = list(engine.drain())
    assert [first, *rest] == [("service", b"a"), ("service", b"b")]
    assert list(engine.drain()) == []


def test_a_newcomer_of_the_same_name_takes_over(wire: Wire) -> None:
    engine, first = wire.pair()
    second = wire.connect(engine.address)
    send(second, "engine", b"I am the service now")
    assert receive(engine) == ("service", b"I am the service now")
    send(engine, "service", b"to you alone")
    assert receive(second) == ("engine", b"to you alone")
    assert is_silent(first)
    first.close()
    send(engine, "service", b"again")
    assert receive(second) == ("engine", b"again")


def test_a_service_that_left_is_unknown(wire: Wire) -> None:
    engine, service = wire.pair()
    service.close()
    deadline_s = time.monotonic() + PATIENCE_S
    while engine.send("service", b"gone?"):
        assert time.monotonic() < deadline_s, "a closed peer is still taken for connected"
        time.sleep(0.002)
    again = wire.connect(engine.address)
    send(again, "engine", b"back")
    assert receive(engine) == ("service", b"back")


def test_after_close(wire: Wire) -> None:
    engine, service = wire.pair()
    for endpoint in (service, engine):
        endpoint.close()
        endpoint.close()
        assert not endpoint.send("engine", b"x")
        assert not endpoint.send("service", b"x")
        assert endpoint.receive() is None


def test_the_other_side_closes_while_this_one_sends(wire: Wire) -> None:
    engine, service = wire.pair()
    stop = threading.Event()
    failures: list[BaseException] = []

    def talk() -> None:
        try:
            while not stop.is_set():
                service.send("engine", b"x" * 1000)
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        for _ in range(100):
            receive(engine)
        engine.close()
        again = wire.listen(engine.address)
        assert receive(again)[0] == "service"
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_the_instance_restarts_at_the_same_address(wire: Wire) -> None:
    engine, service = wire.pair()
    for _ in range(3):
        engine.close()
        engine = wire.listen(engine.address)
        reach(service, engine)
        send(engine, "service", b"welcome back")
        assert receive(service) == ("engine", b"welcome back")


def test_an_address_that_is_taken(wire: Wire) -> None:
    engine, service = wire.pair()
    with pytest.raises(ConfigError, match=r"engine|listen"):
        wire.listen(engine.address)
    send(service, "engine", b"unharmed")
    assert receive(engine) == ("service", b"unharmed")


def test_garbage_reaches_the_codec_and_goes_no_further(wire: Wire) -> None:
    engine, service = wire.pair()
    send(service, "engine", b"\x01\x00 not msgpack \xff\xfe")
    send(service, "engine", codec.encode(Probe(7)))
    _, frame = receive(engine)
    with pytest.raises(ProtocolError):
        codec.decode(frame)
    _, frame = receive(engine)
    assert codec.decode(frame) == Probe(7)


@pytest.mark.parametrize("name", ["", "x" * 300, "\0abc"])
def test_names_that_cannot_be(wire: Wire, name: str) -> None:
    with pytest.raises(ConfigError):
        wire.listen(name=name)
    with pytest.raises(ConfigError):
        wire.connect(wire.address(), name=name)


@pytest.mark.parametrize("opener", [open_listen, lambda a, n: open_connect(a, n, "engine")])
@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:1", "tcp://*:1", "tcp://10.1.2.3:4", "tcp://example.org:4", "tcp://[::]:4",
     "ipc://" + "x" * 108, "http://127.0.0.1:1", "nonsense", "ipc://", "memory://"],
)  # fmt: skip
def test_addresses_that_are_refused(opener: object, address: str) -> None:
    with pytest.raises(ConfigError):
        opener(address, "engine")  # type: ignore[operator]


def test_the_reason_for_refusing_another_host_is_given() -> None:
    with pytest.raises(ConfigError, match="cluster-secret-file"):
        open_listen("tcp://0.0.0.0:5555", "engine")


def test_an_address_chooses_its_transport(tmp_path: Path) -> None:
    for address in (f"ipc://{tmp_path}/s", "memory://chosen", "tcp://127.0.0.1:0"):
        engine = open_listen(address, "engine")
        service = open_connect(engine.address, "service", "engine")
        send(service, "engine", b"x")
        assert receive(engine) == ("service", b"x")
        service.close()
        engine.close()


_ENGINE = """
import select, sys
from penstock.protocol.transport.zmq import listen
engine = listen(sys.argv[1], "engine")
print("up", flush=True)
while True:
    select.select([engine.fileno()], [], [])
    for peer, frame in engine.drain():
        engine.send(peer, sys.argv[2].encode() + b":" + frame)
"""


def _start_engine(address: str, incarnation: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _ENGINE, address, str(incarnation)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_service_keeps_its_connection_over_the_death_of_the_engine(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    with contextlib.ExitStack() as stack:
        first = _start_engine(address, 1)
        stack.callback(_end, first)
        service = over_zmq.connect(address, "service", "engine")
        stack.callback(service.close)
        send(service, "engine", b"a")
        assert receive(service) == ("engine", b"1:a")
        _end(first)
        deadline_s = time.monotonic() + PATIENCE_S
        while service.send("engine", b"lost"):
            assert time.monotonic() < deadline_s
            time.sleep(0.002)
        second = _start_engine(address, 2)
        stack.callback(_end, second)
        send(service, "engine", b"b")
        # Nothing that was meant for the dead one reaches its successor.
        assert receive(service) == ("engine", b"2:b")
