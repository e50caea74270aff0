"""A trace file: loadable at any moment, bounded, and true."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from penstock.protocol.errors import ConfigError
from penstock.trace import NO_TRACE, FileTrace, new_file, open_trace

ROOT = Path(__file__).parents[2]


def events(path: Path) -> list[dict[str, Any]]:
    """As Perfetto reads it: the closing bracket, and what stands before it, may be missing."""
    text = path.read_text().rstrip()
    assert text.startswith("[")
    return json.loads(text.removesuffix(",") + "]")


def spans(path: Path) -> list[dict[str, Any]]:
    return [event for event in events(path) if event["ph"] == "X"]


def test_spans_counters_and_threads(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = open_trace(str(path), "engine-0")
    with trace.span("outer"), trace.span("inner"):
        pass
    trace.add("step 1", 1.0, 1.5, lambda: {"rows": 3})
    trace.count("blocks", 7)
    other = threading.Thread(target=trace.add, args=("elsewhere", 2.0, 3.0), name="compute")
    other.start()
    other.join()
    trace.close()
    found = {event["name"]: event for event in events(path)}
    assert found["step 1"] | {"tid": 0} == {
        "ph": "X", "name": "step 1", "ts": 1e6, "dur": 5e5, "pid": os.getpid(), "tid": 0,
        "args": {"rows": 3},
    }  # fmt: skip
    inner, outer = found["inner"], found["outer"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.01
    assert found["blocks"]["ph"] == "C" and found["blocks"]["args"] == {"value": 7}
    names = {e["tid"]: e["args"]["name"] for e in events(path) if e["name"] == "thread_name"}
    assert names[found["elsewhere"]["tid"]] == "compute"
    assert found["process_name"]["args"] == {"name": "engine-0"}


def test_the_trace_that_is_off_is_one_object_and_keeps_nothing(tmp_path: Path) -> None:
    assert open_trace(None, "engine-0") is NO_TRACE
    with NO_TRACE.span("a"):
        NO_TRACE.add("b", 0.0, 1.0, lambda: pytest.fail("called"))
        NO_TRACE.count("c", 1)
    NO_TRACE.close()


def test_its_size_is_bounded_and_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = FileTrace(path, "engine-0", max_bytes=20_000)
    for number in range(1000):
        trace.add(f"step {number}", number, number + 0.5)
    trace.close()
    assert path.stat().st_size < 21_000
    assert "ends here" in events(path)[-1]["name"]


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    new_file(str(path))
    script = (
        "import sys; from penstock.trace import open_trace\n"
        "t = open_trace(sys.argv[1], sys.argv[2])\n"
        "[t.add(f'{sys.argv[2]} {i}', i, i + 1) for i in range(500)]\n"
        "t.close()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(path), name], env=environment)
        for name in ("service", "engine")
    ]
    assert [child.wait(60) for child in children] == [0, 0]
    by_pid = defaultdict(list)
    for event in spans(path):
        by_pid[event["pid"]].append(event["name"])
    assert sorted(map(len, by_pid.values())) == [500, 500]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        new_file(str(tmp_path / "no such folder" / "trace.json"))
    with pytest.raises(ConfigError, match="cannot be written"):
        open_trace(str(tmp_path / "no such folder" / "trace.json"), "engine-0")


def test_a_full_disk_at_the_start_is_refused_and_nothing_stays_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ConfigError, match="No space left"):
        open_trace("/dev/full", "engine-0")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_full_disk_later_stops_the_trace_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace = FileTrace(tmp_path / "trace.json", "engine-0")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, trace._fd)
    os.close(full)
    with trace.span("lost"):
        pass
    trace._writer.join(10)
    assert not trace._writer.is_alive()
    for _ in range(3):
        with trace.span("after"):
            trace.add("later", 0.0, 1.0, lambda: pytest.fail("called"))
            trace.count("blocks", 1)
    assert not trace._events
    trace.close()
    assert [r.message for r in caplog.records if "No space left" in r.message] == [
        f"tracing stops: {tmp_path / 'trace.json'} cannot be written: No space left on device"
    ]


def test_what_waits_for_the_writer_holds_on_to_nothing(tmp_path: Path) -> None:
    trace = FileTrace(tmp_path / "trace.json", "engine-0")
    trace._closing.set()
    trace._writer.join()
    del trace.add  # the writer is gone: what is queued stays
    asked: list[int] = []
    trace.add("step", 0.0, 1.0, lambda: {"asked": asked.append(1)})
    assert asked and not any(callable(part) for part in trace._events[-1])


LIMITED = """
import resource, sys
from pathlib import Path
from penstock.trace import FileTrace
path = Path(sys.argv[1])
trace = FileTrace(path, "engine-0")
# Room for some whole lines and a part of one: the kernel writes what fits, and then no more.
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, resource.RLIM_INFINITY))
for number in range(100):
    trace.add(f"step {number}", number, number + 0.5)
trace.close()
"""


def test_a_line_of_which_half_fitted_does_not_spoil_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    other = open_trace(str(path), "service")
    other.add("goes on", 0.0, 1.0)
    other.close()
    names = [event["name"] for event in spans(path)]
    assert 3 < len(names) < 20
    assert names == [f"step {n}" for n in range(len(names) - 1)] + ["goes on"]


TRACED = """
import sys
from penstock import LLM, SamplingParams
with LLM("toy", max_num_seqs=4, max_model_len=512, trace=sys.argv[1]) as llm:
    print("up", flush=True)
    while True:
        prompts = [[5 + n] * 20 for n in range(4)]
        llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True), use_tqdm=False)
"""


def test_what_a_killed_engine_leaves_loads_and_its_steps_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    engine = subprocess.Popen(
        [sys.executable, "-c", TRACED, str(path)], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert engine.stdout is not None and engine.stdout.readline() == b"up\n"
        deadline_s = time.monotonic() + 60
        while path.read_text().count('"step ') < 100:
            assert time.monotonic() < deadline_s and engine.poll() is None
            time.sleep(0.05)
    finally:
        engine.send_signal(signal.SIGKILL)
        engine.wait(10)
    found = spans(path)
    steps = [event for event in found if event["name"].startswith("step ")]
    assert {event["args"]["kind"] for event in steps} >= {"prefill", "decode"}
    compute = {event["tid"] for event in steps}
    assert len(compute) == 1
    # One step after the other, and what happens inside one stays inside.
    ends = [(event["ts"], event["ts"] + event["dur"]) for event in steps]
    assert all(end <= start + 0.01 for (_, end), (start, _) in pairwise(ends))
    for part in ("apply", "plan", "forward", "sample"):
        inside = [event for event in found if event["name"] == part and event["tid"] in compute]
        assert inside, part
        for event in inside[:-1]:
            start, end = event["ts"], event["ts"] + event["dur"]
            assert (
                any(a - 0.01 <= start and end <= b + 0.01 for a, b in ends) or start > ends[-1][1]
            )
    # The driver and the mapping thread have tracks of their own.
    assert {event["tid"] for event in found if event["name"] == "schedule"}.isdisjoint(compute)
    mapped = {event["tid"] for event in found if event["name"].startswith("map for step")}
    assert mapped and mapped.isdisjoint(compute)
    assert any(event["ph"] == "C" for event in events(path))
