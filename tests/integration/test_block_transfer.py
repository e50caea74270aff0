"""Two engines on one host: KV computed by one is used by the other, and never wrongly."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from penstock.engine import build
from penstock.engine.transfer import tcp
from penstock.engine.transfer.pages import CannotAttach, attach
from penstock.protocol import secret
from penstock.protocol.errors import ConfigError
from penstock.protocol.kv import BlockHandle, Fetched, KvSource, split_keys
from penstock.protocol.request import SamplingParams
from tests.helpers.engines import Instance, address, engine_thread, handover_plan

PROMPT = [(7 * i * i + 3 * i) % 200 for i in range(100)]
NUM_BLOCKS = len(PROMPT) // 16


@pytest.fixture
def with_secret() -> Iterator[None]:
    """Without one, no port is opened beside Unix sockets."""
    secret.use(secret.ClusterSecret(b"of the engines of a test"))
    yield
    secret.use(None)


class Pair:
    """`owner` and `receiver`, engines in this process that are connected over ipc."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.engines = [engine_thread(folder, name, **settings) for name in ("owner", "receiver")]
        self.owner = Instance(address(folder, "owner"), "owner")
        self.receiver = Instance(address(folder, "receiver"), "receiver")

    def close(self) -> None:
        for instance in (self.owner, self.receiver):
            instance.close()
        for engine in self.engines:
            engine.close()


def pair_with(tmp_path: Path, means: str) -> Pair:
    if means == "mooncake":
        pytest.importorskip("mooncake.engine", reason="the Mooncake transfer engine is missing")
        means = "mooncake,tcp"
    return Pair(tmp_path, kv_transfer=means)


@pytest.fixture(params=["map", "tcp", "mooncake"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, with_secret: None) -> Iterator[Pair]:
    made = pair_with(tmp_path, request.param)
    made.means = request.param  # type: ignore[attr-defined]
    yield made
    made.close()


def test_a_prefix_is_fetched_and_tokens_are_those_of_the_undisturbed_run(pair: Any) -> None:
    expected = pair.owner.run("a", PROMPT)
    fetched = pair.receiver.fetch("b", PROMPT, pair.owner)
    assert (fetched.num_blocks, fetched.means, fetched.reason) == (NUM_BLOCKS, pair.means, "")
    assert pair.receiver.run("b", PROMPT) == expected
    assert pair.receiver.rows["b"][0].cached_tokens == 16 * NUM_BLOCKS


def test_a_submit_names_its_source_itself(pair: Any) -> None:
    expected = pair.owner.run("a", PROMPT)
    source = pair.owner.source(NUM_BLOCKS)
    assert pair.receiver.run("b", PROMPT, kv_source=source) == expected
    assert pair.receiver.rows["b"][0].cached_tokens == 16 * NUM_BLOCKS


def test_prefill_here_and_decode_there(pair: Any) -> None:
    expected = pair.owner.run("undisturbed", PROMPT, block_keys=b"")
    plan = handover_plan(pair.owner, pair.receiver)
    pair.owner.submit("a", PROMPT, plan=plan)
    fetched = pair.receiver.fetch("a", PROMPT, pair.owner)
    first = pair.owner.result("a")
    assert pair.owner.rows["a"][-1].finish == "handover" and len(first) == 1
    rest = pair.receiver.run("a", PROMPT, attempt=2, resumed_ids=first, plan=plan[1:])
    assert first + rest == expected
    assert fetched.num_blocks == NUM_BLOCKS


def scheduler_of(pair: Any, which: int) -> Any:
    return pair.engines[which]._driver.core.scheduler


def memory_of(pair: Any, which: int) -> Any:
    return pair.engines[which]._driver._mover._memory


def test_pages_that_the_owner_takes_back_cost_time_and_no_token(tmp_path: Path) -> None:
    """As after a lease that ended: the generations move on, then the pages are written over, while
    a sequence of the receiver reads them."""
    pair = Pair(tmp_path, kv_transfer="map")
    sampling = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    expected = pair.owner.run("a", PROMPT, sampling=sampling)
    assert pair.receiver.fetch("b", PROMPT, pair.owner).num_blocks == NUM_BLOCKS
    pair.receiver.submit("b", PROMPT, sampling=sampling)
    pair.receiver.until(lambda: len(pair.receiver.rows.get("b", [])) >= 5)
    owned = memory_of(pair, 0)
    scheduler_of(pair, 0).pool.generations[:] += 1
    owned.bytes[:] = 0x7F
    assert pair.receiver.result("b") == expected
    # What was stale is not found again, and what was computed instead is.
    assert pair.receiver.run("c", PROMPT, sampling=sampling) == expected
    pair.close()


def test_a_stale_offer_does_not_come(pair: Any) -> None:
    """The owner has moved on between its offer and the copy: what is told of as ready is refused by
    the data plane, and computed."""
    expected = pair.owner.run("a", PROMPT)
    held = scheduler_of(pair, 0).pool.generations
    offered = pair.engines[0]._driver.core.exchange.offers
    held_before = held.copy()
    original = offered._tell

    def tell(*args: Any) -> Any:
        effects = original(*args)
        held[2] += 1
        return effects

    offered._tell = tell
    fetched = pair.receiver.fetch("b", PROMPT, pair.owner)
    held[:] = held_before
    assert fetched.num_blocks < NUM_BLOCKS and fetched.reason
    assert pair.receiver.run("b", PROMPT) == expected


def test_what_is_spoilt_on_the_way_is_computed(
    tmp_path: Path, monkeypatch: Any, with_secret: None
) -> None:
    pair = Pair(tmp_path, kv_transfer="tcp")
    expected = pair.owner.run("a", PROMPT)
    receive_into = tcp.receive_into

    def flip(connection: Any, into: memoryview, progress: Any) -> None:
        receive_into(connection, into, progress)
        if len(into) > 1000:
            into[len(into) // 2] ^= 1

    monkeypatch.setattr(tcp, "receive_into", flip)
    fetched = pair.receiver.fetch("b", PROMPT, pair.owner)
    assert fetched.num_blocks == 0 and fetched.reason
    assert pair.receiver.run("b", PROMPT) == expected
    pair.close()


def test_an_owner_that_is_gone_or_hangs_does_not_stop_a_request(
    tmp_path: Path, with_secret: None
) -> None:
    pair = Pair(tmp_path, kv_transfer="tcp")
    expected = pair.owner.run("a", PROMPT)
    silent = KvSource("nobody", 1, f"ipc://{tmp_path}/nobody.sock", NUM_BLOCKS)
    assert pair.receiver.run("b", PROMPT, kv_source=silent) == expected
    other = msgspec.structs.replace(pair.owner.source(NUM_BLOCKS), incarnation=99)
    longer = [*PROMPT[:50], 1, *PROMPT[51:]]
    expected = pair.owner.run("c", longer)
    assert pair.receiver.run("d", longer, kv_source=other) == expected
    assert pair.receiver.wait_for(Fetched).num_blocks == 0
    pair.close()


def test_instances_that_compute_otherwise_share_no_key(tmp_path: Path) -> None:
    """Their int8 KV is laid out alike, and is not the same."""
    engines = [
        engine_thread(tmp_path, name, kv_cache_dtype="int8", dtype=dtype)
        for name, dtype in (("owner", "bfloat16"), ("receiver", "float32"))
    ]
    owner, receiver = (Instance(address(tmp_path, name), name) for name in ("owner", "receiver"))
    assert owner.card.layout.digest() == receiver.card.layout.digest()
    assert not {*split_keys(owner.keys(PROMPT))} & {*split_keys(receiver.keys(PROMPT))}
    owner.run("a", PROMPT)
    fetched = receiver.fetch("b", PROMPT, owner)
    assert fetched.num_blocks == 0 and "different models" in fetched.reason
    for each in (owner, receiver, *engines):
        each.close()


@pytest.mark.parametrize("part", ["Scheduler", "_card", "InstanceCore", "Premapper"])
def test_a_start_that_fails_late_closes_the_data_plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    opened: list[Any] = []
    open_transfer = build.open_transfer

    def watched(*args: Any, **settings: Any) -> Any:
        opened.append(open_transfer(*args, **settings))
        return opened[-1]

    def fails(*args: Any, **settings: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(build, "open_transfer", watched)
    monkeypatch.setattr(build, part, fails)
    with pytest.raises(ZeroDivisionError):
        engine_thread(tmp_path, "owner")
    endpoint = opened[0].mover.endpoints["map"]
    with pytest.raises(CannotAttach, match="refused"):
        attach(endpoint, incarnation=1, layout_digest="", block_stride_bytes=1)


def test_without_a_secret_no_port_is_opened(tmp_path: Path) -> None:
    def ports() -> int:
        return sum(
            connection.status == "LISTEN" for connection in psutil.Process().net_connections("tcp")
        )

    before = ports()
    pair = Pair(tmp_path)
    assert ports() == before and "tcp" not in pair.owner.card.endpoints
    expected = pair.owner.run("a", PROMPT)
    fetched = pair.receiver.fetch("b", PROMPT, pair.owner)
    assert (fetched.num_blocks, fetched.means) == (NUM_BLOCKS, "map")
    assert pair.receiver.run("b", PROMPT) == expected
    pair.close()
    for means in ("tcp", "mooncake,tcp"):
        with pytest.raises(ConfigError, match="any user of this host could ask"):
            Pair(tmp_path, kv_transfer=means)
    assert ports() == before


def test_a_port_gives_no_block_to_who_does_not_know_what_is_in_it(
    tmp_path: Path, with_secret: None
) -> None:
    pair = Pair(tmp_path, kv_transfer="tcp")
    pair.owner.run("a", PROMPT)
    layout, pool = pair.owner.card.layout, scheduler_of(pair, 0).pool
    key = secret.current()
    assert key is not None
    connection = tcp.Connection(
        pair.owner.card.endpoints["tcp"],
        tcp.Expected(1, layout.block_bytes),
        key.derive("kv blocks"),
    )
    guesses = [
        BlockHandle(block, int(generation), b"guess".ljust(16))
        for block, generation in enumerate(pool.generations)
    ]
    assert connection.checksums(guesses) == [None] * len(guesses)
    true = [pool.block_of(each) for each in split_keys(pair.owner.keys(PROMPT))]
    known = [BlockHandle(b, int(pool.generations[b]), pool.key_of(b)) for b in true]
    assert None not in connection.checksums(known)
    connection.close()
    pair.close()


def test_nothing_is_left_behind(tmp_path: Path, with_secret: None) -> None:
    def left() -> tuple[int, int, int]:
        gc.collect()
        fds = [str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
        maps = Path("/proc/self/maps").read_text().count("penstock-kv")
        threads = sum(t.name.startswith("kv-") for t in threading.enumerate())
        return sum("penstock-kv" in f or "socket" in f for f in fds), maps, threads

    def once(folder: Path) -> None:
        folder.mkdir()
        pair = Pair(folder, kv_transfer="map,tcp")
        pair.owner.run("a", PROMPT)
        pair.receiver.fetch("b", PROMPT, pair.owner)
        pair.receiver.run("b", PROMPT)
        pair.close()

    once(tmp_path / "warm")  # ZeroMQ keeps some sockets of its own
    before = left()
    once(tmp_path / "again")
    assert left() <= before
