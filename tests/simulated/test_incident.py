"""Recordings: worlds with faults, recorded and replayed; files that are torn, spoilt or strange."""

from __future__ import annotations

import inspect
import logging
import os
import struct
import subprocess
import sys
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.protocol.errors import ConfigError, Overloaded
from penstock.protocol.request import SamplingParams
from penstock.service import recorder
from penstock.service.assemble import open_tape
from penstock.service.config import ClusterConfig, ServeConfig
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import GenerationSpec
from penstock.service.recipe import CoreRecipe
from penstock.service.recorder import NO_TAPE, FileTape, RecordedCore, make_core
from penstock.service.recording import (
    CALLS,
    INPUTS,
    MAGIC,
    Step,
    array_of,
    encode_step,
    open_recording,
    pack_call,
    piece,
)
from penstock.simulator.incident import Moment, Replay
from penstock.simulator.storms.draw import storm_of
from penstock.simulator.storms.play import play
from tests.helpers.recorded import RECIPE, eventful, record_every_service, record_services


@pytest.fixture
def taped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileTape:
    """Services of worlds are recorded."""
    return record_services(tmp_path / "incident", monkeypatch)


def replayed(path: Path) -> tuple[Replay, list[Moment]]:
    replay = Replay(open_recording(path))
    return replay, list(replay)


@pytest.mark.parametrize("seed", range(2))
def test_a_world_with_faults_is_replayed_exactly(taped: FileTape, seed: int) -> None:
    world = eventful(seed)
    taped.close()
    replay, moments = replayed(taped.path)
    assert [m.difference for m in moments if m.difference] == []
    assert replay.recording.problem == ""
    assert len(moments) > 1000 and {m.name for m in moments} >= {
        "submit", "cancel", "on_message", "on_timer", "on_instance_lost", "drain_instance",
    }  # fmt: skip
    assert len(replay.core.journal) == 0 and world.now == 20.0
    # What was decided is known again, with its reasons.
    explained = replay.core.explain("r7")
    assert explained is not None and explained.choices[0].placements[0].decision is not None


@pytest.mark.parametrize("first", [0, 10])
def test_services_of_storms_are_replayed_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Clocks that jump, partitions, services that crash: every service's record replays."""
    tapes = record_every_service(tmp_path, monkeypatch)
    for seed in range(first, first + 10):
        assert play(storm_of(seed)).ok
    for tape in tapes:
        tape.close()
        _, moments = replayed(tape.path)
        assert [m.difference for m in moments if m.difference] == [], tape.path
    assert len(tapes) >= 10


_AGAIN = """
import sys
from pathlib import Path
from penstock.service.recording import open_recording
from penstock.simulator.incident import Replay
moments = list(Replay(open_recording(Path(sys.argv[1]))))
print(len(moments), repr(moments[-1].difference))
"""


def test_under_other_hash_seeds(taped: FileTape) -> None:
    eventful(9)
    taped.close()
    said = set()
    for seed in ("1", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _AGAIN, str(taped.path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1 and said.pop().endswith(" ''\n")


def test_a_difference_is_found_and_said(taped: FileTape) -> None:
    """Another policy decides otherwise at some step: replayed with it, that step is named."""
    eventful(1)
    taped.close()
    recording = open_recording(taped.path)
    other = CoreRecipe(RECIPE.config, "round-robin", kv_index=True)
    recording.header = msgspec.structs.replace(recording.header, recipe=other)
    *same, last = Replay(recording)
    assert all(not m.difference for m in same)
    assert last.difference.startswith(("then: ", "now: "))


def test_every_input_is_recorded() -> None:
    """A public method of the core is an input, or is known to change nothing."""
    looks = {"journal", "instances", "ready", "explain", "check"}
    public = {
        name
        for name, _ in inspect.getmembers(ServiceCore)
        if not name.startswith("_") and name != "config"
    }
    assert public - looks == set(INPUTS) == set(CALLS)
    for name in INPUTS:
        assert getattr(RecordedCore, name) is not getattr(ServiceCore, name)


def test_without_a_tape_there_is_nothing_between() -> None:
    assert type(make_core(RECIPE, NO_TAPE)) is ServiceCore


def test_errors_are_a_part_of_it(tmp_path: Path) -> None:
    tape = FileTape(tmp_path / "r")
    core = make_core(CoreRecipe(ServiceCoreConfig(name="s", max_queue=1)), tape)
    core.add_instance("engine-0", 0.0)
    spec = GenerationSpec("a", [1, 2, 3], SamplingParams(max_tokens=2))
    core.submit(spec, 1.0)
    with pytest.raises(Overloaded):
        core.submit(GenerationSpec("b", [1], SamplingParams(max_tokens=2)), 1.1)
    with pytest.raises(KeyError):
        core.on_instance_lost("nobody", 1.2)
    # What broke the core is on the disk already.
    _, moments = replayed(tape.path)
    assert [m.raised for m in moments] == ["", "", "overloaded", "KeyError: 'nobody'"]
    assert not any(m.difference for m in moments)
    tape.close()


# --- files ----------------------------------------------------------------------------------------


def short_recording(path: Path, steps: int = 3) -> Path:
    tape = FileTape(path)
    core = make_core(RECIPE, tape)
    core.add_instance("engine-0", 0.0)
    for number in range(steps - 1):
        tape.flush()
        core.on_timer(0.25 * (number + 1))
    tape.close()
    return tape.path


def test_no_recording_is_overwritten_and_nobody_else_reads_it(tmp_path: Path) -> None:
    first, second = (short_recording(tmp_path / "r") for _ in range(2))
    assert (first.name, second.name) == ("r", "r.1")
    assert first.stat().st_mode & 0o077 == 0
    assert len(replayed(first)[1]) == len(replayed(second)[1]) == 3


def test_a_torn_end_is_tolerated(tmp_path: Path) -> None:
    whole = short_recording(tmp_path / "r").read_bytes()
    lengths, problems = set(), set()
    for cut in range(1, 60):
        torn = tmp_path / "torn"
        torn.write_bytes(whole[:-cut])
        replay, moments = replayed(torn)
        lengths.add(len(moments))
        assert not any(m.difference for m in moments)
        problems.add(replay.recording.problem.partition(" at ")[0])
    assert problems == {"it ends within a piece"}
    assert max(lengths) == 2


def test_a_spoilt_piece_ends_it(tmp_path: Path) -> None:
    path = short_recording(tmp_path / "r")
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    replay, moments = replayed(path)
    assert len(moments) == 2 and "damaged at byte" in replay.recording.problem


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"arrival_s,input_tokens\n", "is no recording"),
        (MAGIC, "there is nothing in its header"),
        (MAGIC + b"PR", "ends within a piece"),
        (MAGIC + piece(b"\x81\xa6format\x63"), "has format 99 and this release reads 1"),
        (MAGIC + piece(b"\x81\xa6format\x01"), "its header cannot be read"),
        (MAGIC + piece(b"\x93"), "its header cannot be read"),
        (MAGIC + piece(b"\x81\xa1\xff\x01"), "its header cannot be read"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        open_recording(tmp_path / "x")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_recording(tmp_path / "nowhere")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    path = short_recording(tmp_path / "r")
    whole = len(replayed(path)[1])
    spoilt = encode_step(Step(["unheard_of", 1.0], 0, 0)).replace(b"unheard", b"unhe\xffrd")
    with path.open("ab") as file:
        file.write(piece(array_of([spoilt])))
    replay, moments = replayed(path)
    assert len(moments) == whole and "it is damaged at byte" in replay.recording.problem


def test_steps_of_another_release(tmp_path: Path) -> None:
    path = short_recording(tmp_path / "r")
    with path.open("ab") as file:
        file.write(piece(array_of([encode_step(Step(["unheard_of", 1.0], 0, 0))])))
    with pytest.raises(ConfigError, match="replay it with that release"):
        replayed(path)


def test_it_stops_at_its_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tape = FileTape(tmp_path / "r", max_bytes=3000)
    core = make_core(RECIPE, tape)
    core.add_instance("engine-0", 0.0)
    with caplog.at_level(logging.WARNING):
        for number in range(400):
            core.on_timer(0.25 * number)
            tape.flush()
    tape.close()
    assert tape.path.stat().st_size <= 3000
    assert [r.message for r in caplog.records].count(
        f"{tape.path} has reached --record-max-bytes: nothing more is recorded"
    ) == 1
    _, moments = replayed(tape.path)
    assert 5 < len(moments) < 400 and not any(m.difference for m in moments)


def test_the_service_goes_on_where_the_recorder_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tape = FileTape(tmp_path / "r")
    core = make_core(RECIPE, tape)
    core.add_instance("engine-0", 0.0)
    core.on_timer(0.25)

    def broken(effects: object) -> int:
        raise TypeError("no such effect")

    monkeypatch.setattr(recorder, "digest_of", broken)
    for number in range(3):
        assert core.on_timer(0.5 + 0.25 * number)
    tape.close()
    assert [r.message for r in caplog.records] == [
        "a call of on_timer cannot be recorded",
        "TypeError: no such effect: nothing more is recorded",
    ]
    assert len(replayed(tape.path)[1]) == 2


@pytest.mark.parametrize(
    "stored", [zlib.compress(bytes(1 << 20)), zlib.compress(b"0123456789")[:-1], b"nonsense"]
)
def test_a_piece_that_is_not_what_it_says(tmp_path: Path, stored: bytes) -> None:
    path = tmp_path / "forged"
    head = struct.pack("<2sIII", b"PR", len(stored), 10, zlib.crc32(stored))
    path.write_bytes(MAGIC + head + stored)
    with pytest.raises(ConfigError, match="it is damaged"):
        open_recording(path)


def test_after_its_end_it_writes_to_nobody_elses_file(tmp_path: Path) -> None:
    tape = FileTape(tmp_path / "record")
    tape.header(RECIPE)
    tape.close()
    size = tape.path.stat().st_size
    others = os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY)  # gets the number that is free
    try:
        tape.add(Step("", 0, 0))
        tape.flush()
        tape.close()
        assert os.fstat(others).st_size == 0 and tape.path.stat().st_size == size
    finally:
        os.close(others)


def test_it_may_stop_while_it_takes(tmp_path: Path) -> None:
    class Stops(deque[bytes]):
        """The core's thread is faster."""

        def popleft(self) -> bytes:
            tape.stop("enough")
            return super().popleft()

    tape = FileTape(tmp_path / "record")
    tape._waiting = Stops([b"\x90", b"\x90"])
    tape.flush()
    tape.close()
    assert tape.stopped == "enough" and not tape._waiting


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--record .* cannot be written"):
        FileTape(tmp_path / "no" / "folder")
    for worker in (None, 1):
        cluster = ClusterConfig(api_worker=worker)
        with pytest.raises(ConfigError, match=r"is a folder: name a file in it, .*/incident"):
            open_tape(ServeConfig("toy", ("toy",), record=str(tmp_path), cluster=cluster))
    assert list(tmp_path.parent.glob(f"{tmp_path.name}.*")) == []


def test_calls_are_packed_with_their_keywords() -> None:
    packed: Any = pack_call("lead", (3, 1.0), {"elected": True})
    assert (packed.term, packed.now, packed.elected) == (3, 1.0, True)
