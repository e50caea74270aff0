"""Recorded runs told, and with one thing changed. The recorded ones are simulated themselves, with
costs that are known: so the unchanged simulation has to come close."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest

from penstock.cli import replay
from penstock.cli.main import main
from penstock.loadgen.prompts import prompt_ids
from penstock.loadgen.traces import read_trace
from penstock.protocol.errors import ConfigError
from penstock.service.recorder import FileTape, make_core
from penstock.service.recording import open_recording
from penstock.simulator.incident import Replay
from penstock.simulator.recorded_run import RecordedRun, collect
from penstock.simulator.what_if import Case, _median_error, case_of, change, what_if
from tests.helpers.recorded import RECIPE, eventful, record_services, small_world, submit_many


@pytest.fixture
def taped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileTape:
    return record_services(tmp_path / "incident", monkeypatch)


@pytest.fixture
def busy(taped: FileTape) -> Path:
    """Thirty requests; engine-1 is killed while they run, and comes back two seconds later."""
    world = small_world(5, instances=2)
    submit_many(world, 30, every_s=0.12)
    world.at(3.0, lambda: world.kill("engine-1", noticed_by="service"))
    world.at(5.0, lambda: world.add_instance("engine-1") and None)
    world.run(12.0)
    assert len(world.core("service").journal) == 0
    taped.close()
    return taped.path


def recorded_in(path: Path) -> RecordedRun:
    return collect(Replay(open_recording(path)))


def test_what_a_recording_says(busy: Path) -> None:
    run = recorded_in(busy)
    assert len(run.sequences) == 45  # every second request has two choices
    assert all(s.finish == "length" for s in run.sequences.values())
    assert [s.output_tokens for s in run.sequences.values()][:3] == [20, 21, 21]
    (fault,) = run.faults
    assert (fault.name, fault.kind) == ("engine-1-crash", "crash")
    assert fault.at_s == pytest.approx(3.0, abs=0.01)
    assert fault.until_s == pytest.approx(5.0, abs=0.5)
    assert run.num_resumed > 0 and set(run.instances) == {"engine-0", "engine-1"}
    assert sum(run.placements.values()) >= 45


def test_its_trace_has_what_prompts_share(busy: Path) -> None:
    run = recorded_in(busy)
    trace = run.trace()
    was = [s.prompt_ids for s in run.sequences.values()]
    made = [prompt_ids(request, number) for number, request in enumerate(trace)]
    assert [len(p) for p in was] == [len(p) for p in made]
    for i in range(len(was)):
        for j in range(i):
            assert _shared_blocks(was[i], was[j]) == _shared_blocks(made[i], made[j])
    assert any(_shared_blocks(was[i], was[i + 1]) for i in range(len(was) - 1))


def _shared_blocks(one: list[int], other: list[int]) -> int:
    blocks = 0
    while (end := 16 * (blocks + 1)) <= min(len(one), len(other)):
        if one[end - 16 : end] != other[end - 16 : end]:
            break
        blocks += 1
    return blocks


def test_without_its_failure(busy: Path) -> None:
    told = what_if(recorded_in(busy), ["without=engine-1-crash"])
    assert told.recorded.resumed > 0 and told.unchanged.resumed > 0 and told.changed.resumed == 0
    assert told.recorded.answered == told.unchanged.answered == told.changed.answered == 45
    # The recorded run was this very simulation, with exact costs where this one has fitted ones.
    assert told.ttft_error is not None and told.ttft_error < 0.15
    assert told.tpot_error is not None and told.tpot_error < 0.15
    assert sum(told.changed.placements.values()) == 45
    assert min(told.changed.placements.values()) > 10


def test_with_more_and_with_fewer_instances(busy: Path) -> None:
    run = recorded_in(busy)
    more = what_if(run, ["instances=+1"])
    assert list(more.changed.placements) == ["engine-0", "engine-1", "engine-0-copy-1"]
    assert more.changed.placements["engine-0-copy-1"] > 5
    fewer = what_if(run, ["instances=1", "policy=least-load"])
    assert list(fewer.changed.placements) == ["engine-0"]
    assert fewer.changed.ttft_s is not None and more.changed.ttft_s is not None
    assert fewer.changed.ttft_s["p90"] > more.changed.ttft_s["p90"]


def test_an_slo_judges_all_three(busy: Path) -> None:
    told = what_if(recorded_in(busy), ["tpot_slo=1ms"])
    assert [t.attained for t in (told.recorded, told.unchanged, told.changed)] == [0.0, 0.0, 0.0]
    told = what_if(recorded_in(busy), ["ttft_slo=60s", "tpot_slo=60s"])
    assert [t.attained for t in (told.recorded, told.unchanged, told.changed)] == [1.0, 1.0, 1.0]


def test_a_silence_is_no_crash(taped: FileTape) -> None:
    world = small_world(3, instances=2)
    submit_many(world, 20)
    world.at(2.0, lambda: world.stop("engine-0", 4.0))
    world.run(12.0)
    taped.close()
    run = recorded_in(taped.path)
    (fault,) = run.faults
    assert (fault.name, fault.kind) == ("engine-0-silence", "silence")
    assert fault.at_s == pytest.approx(2.0, abs=0.6)  # heartbeats come twice a second
    told = what_if(run, ["without=engine-0-silence"])
    assert told.unchanged.resumed > 0 == told.changed.resumed


def test_instances_that_are_removed_or_replaced(taped: FileTape) -> None:
    world = small_world(7, instances=3)
    core = world.core("service")
    submit_many(world, 30)
    world.at(2.0, lambda: world.tell("service", lambda now: core.remove_instance("engine-2", now)))
    world.at(2.5, lambda: world.kill("engine-1"))
    world.at(2.6, lambda: world.add_instance("engine-1") and None)
    world.run(12.0)
    taped.close()
    run = recorded_in(taped.path)
    found = {fault.name: fault for fault in run.faults}
    assert list(found) == ["engine-2-removal", "engine-1-crash"]
    assert found["engine-2-removal"].at_s == pytest.approx(2.0, abs=0.01)
    assert found["engine-2-removal"].until_s == float("inf")
    assert found["engine-1-crash"].at_s <= 2.5 < found["engine-1-crash"].until_s < 6.0
    assert sum(run.placements.values()) >= 45 and run.placements["engine-2"] > 0
    told = what_if(run, ["without=engine-2-removal"])
    assert told.changed.answered == 45
    assert told.changed.placements["engine-2"] > told.unchanged.placements["engine-2"]


CASE = Case("slo-aware", "auto", ("engine-0", "engine-1"), None, None, ())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("policy=fastest", "is not a policy"),
        ("instances=many", r"write \+1, -1 or a number"),
        ("instances=-2", "0 instances; there may be 1 to 9999"),
        ("instances=100000", "100000 instances; there may be 1 to 9999"),
        ("without=engine-7-crash", "there is no failure 'engine-7-crash'.*there is none"),
        ("ttft_slo=2", "write a time with its unit"),
        ("speed=0", "a number above 0"),
        ("colour=blue", "of policy, pd, instances"),
        ("policy", "write what=how"),
    ],
)
def test_changes_that_make_no_sense(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change(CASE, words)


def test_changes_add_up() -> None:
    case = change(change(CASE, "instances=+2"), "instances=-3")
    assert (case.instances, case.copies) == (("engine-0",), 0)
    assert change(CASE, "pd=1:1").pd == "1:1"


def test_a_recording_in_which_nothing_ran(tmp_path: Path) -> None:
    tape = FileTape(tmp_path / "r")
    make_core(RECIPE, tape).add_instance("engine-0", 0.0)
    tape.close()
    with pytest.raises(ConfigError, match="holds no requests"):
        recorded_in(tape.path)


# --- the command ----------------------------------------------------------------------------------


def test_the_time_line(taped: FileTape, capsys: pytest.CaptureFixture[str]) -> None:
    eventful(2)
    taped.close()
    path = str(taped.path)
    assert main(["replay", path]) == 0
    out = capsys.readouterr().out
    for words in (
        "engine-1 is reported lost", "engine-1 is lost, no more active", "r7 arrives: ",
        "slo-aware: ", "rather than engine-", "an operator wants engine-0 to be prefill",
        "the client of r20 goes away", "engine-2 is to be emptied", "all that came of them came",
    ):  # fmt: skip
        assert words in out, words
    assert main(["replay", path, "--request", "r7", "--until", "9s"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert lines and all("r7" in line or line.startswith(" " * 14) for line in lines)
    assert main(["replay", path, "--step", "--instance", "engine-1", "--from", "3s"]) == 0
    out = capsys.readouterr().out
    assert "in   on_instance_lost" in out and "out  to engine-" in out


def test_steps_one_at_a_time(
    taped: FileTape, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = small_world(1, instances=1)
    submit_many(world, 1)
    world.run(3.0)
    taped.close()
    answers = iter(["", "", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert main(["replay", str(taped.path), "--step"]) == 0
    out = capsys.readouterr().out
    assert [f"step {n}" in out for n in range(4)] == [True, True, True, False]


def test_the_time_line_for_programs(taped: FileTape, capsys: pytest.CaptureFixture[str]) -> None:
    eventful(2)
    taped.close()
    assert main(["replay", str(taped.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] and found["difference"] is None and found["problem"] is None
    arrivals = [line for line in found["timeline"] if "arrives" in line["text"]]
    assert len(arrivals) == 60 and arrivals[7]["requests"] == ["r7"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--request", "zzzz"], 2, "nothing concerns request zzzz; the instances are: engine-0, "),
        (["--instance", "zzz", "--step"], 2, "nothing concerns instance zzz; the instances"),
        (["--instance", "zzz", "--json"], 2, "nothing concerns instance zzz"),
        (["--request", "r7", "--instance", "zzz"], 2, "request r7 with instance zzz;"),
        (["--request", "r7", "--until", "1s"], 2, "request r7 up to 1 s;"),
        (["--request", "r7", "--from", "11s"], 0, "in this stretch of time; elsewhere something"),
        (["--from", "1h"], 2, "nothing is recorded from 3600 s on: it ends at 1"),
        (["--from", "20s", "--until", "10s"], 2, "--until 10 s is before --from 20 s"),
        (["--request", "r7", "--change", "instances=+1"], 2, "--request is about the time line"),
        (["--seed", "2"], 2, "give it with --change"),
    ],
)
def test_what_is_not_there_is_said(
    busy: Path, flags: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(busy), *flags]) == code
    said = capsys.readouterr()
    assert message in said.out + said.err
    if "--json" in flags:
        assert json.loads(said.out)["timeline"] == [] and message in said.err


def test_a_change_and_a_trace_by_command(
    busy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.jsonl"
    assert main(["replay", str(busy), "--export-trace", str(out)]) == 0
    assert "45 requests written" in capsys.readouterr().out
    assert len(read_trace(out)) == 45
    assert main(["replay", str(busy), "--change", "without=engine-1-crash"]) == 0
    said = capsys.readouterr().out
    assert "the unchanged simulation is off" in said and "engine-1-crash at 3.0 s, for" in said
    assert main(["replay", str(busy), "--change", "policy=least-load", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changed"]["answered"] == 45 and found["faults"][0]["name"] == "engine-1-crash"
    assert main(["replay", str(busy), "--change", "without=?"]) == 0
    assert "engine-1-crash at 3.0 s" in capsys.readouterr().out
    assert main(["replay", str(busy), "--change", "without=nobody"]) == 2
    assert "there is engine-1-crash at 3.0 s" in capsys.readouterr().err


def test_a_torn_recording_is_not_called_whole(
    busy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn"
    torn.write_bytes(busy.read_bytes() + b"PR")
    assert main(["replay", str(torn), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] and not found["complete"] and "ends within" in found["problem"]
    assert main(["replay", str(torn), "--until", "1s"]) == 0


def test_times_of_nothing_have_no_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = _median_error(np.array([1.0, 2.2, np.nan, 1]), np.array([0.0, 2.0, 1, np.nan]))
    assert found == pytest.approx(0.1)


def test_what_it_was_meant_for_is_found_where_it_differs(
    taped: FileTape, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this release decided otherwise."""
    eventful(4)
    taped.close()
    case = case_of(recorded_in(taped.path))
    assert (case.policy, case.pd) == ("slo-aware", "off")
    from penstock.service.policies import routing

    monkeypatch.setitem(routing.POLICIES, "slo-aware", routing.round_robin)
    assert main(["replay", str(taped.path)]) == 1
    out = capsys.readouterr().out
    assert "differs: then: " in out and "please report this as a bug" in out
    for other, words in (
        ({"version": "0.0.0"}, "by release 0.0.0"),
        ({"code": "abc"}, "by other code of release"),
    ):
        recording = open_recording(taped.path)
        recording.header = msgspec.structs.replace(recording.header, **other)
        assert words in replay.blame(recording)
    assert main(["replay", str(taped.path), "--change", "instances=+1"]) == 2
    assert "does not replay as it was recorded" in capsys.readouterr().err
