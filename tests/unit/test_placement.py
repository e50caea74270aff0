"""How many threads compute and where: by affinity, by the control group's quota, by flag."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from penstock.engine.build import build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.platforms.cpu import kernels
from penstock.engine.platforms.cpu.placement import (
    bind_team,
    choose,
    count_cores,
    cpu_quota,
    format_cpus,
    parse_cpus,
)
from penstock.protocol.errors import ConfigError

ROOT = Path(__file__).parents[2]


def threads(bind="auto", num_threads=None, allowed=range(8), num_cores=8, quota=None) -> int:
    chosen = choose(bind, num_threads, allowed=allowed, num_cores=num_cores, quota=quota)
    return chosen.num_threads


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 8), (16.0, 8), (4.0, 4), (2.5, 2), (1.0, 1), (0.25, 1)]
)
def test_no_more_threads_than_the_quota_lets_run(quota, expected) -> None:
    assert threads(quota=quota) == expected


def test_one_thread_a_core_and_what_is_asked_for_goes_before() -> None:
    assert threads(num_cores=4) == 4
    assert threads(num_threads=6, quota=1.0) == 6
    assert threads("0,2,4") == 3
    assert threads("0,2,4", num_threads=2) == 2


def test_processors_are_given_to_threads_in_order() -> None:
    chosen = choose("4-5,1", 2, allowed=range(8), num_cores=8, quota=None)
    assert chosen.cpus == (4, 5)


@pytest.mark.parametrize("bind", ["", "a", "3-1", "1,,2", "1-", "1,1", "0-2,2", "-1"])
def test_what_is_no_list_of_processors_is_refused(bind) -> None:
    with pytest.raises(ConfigError, match="--cpu-bind"):
        threads(bind)


def test_processors_that_are_not_ours_are_refused_by_number() -> None:
    with pytest.raises(ConfigError, match=r"may not use processor 2 .*may use 0-1,6"):
        threads("0-3", allowed=[0, 1, 6])
    with pytest.raises(ConfigError, match="more than the 2 processors"):
        threads("0-1", num_threads=3)


@given(st.lists(st.integers(0, 400), min_size=1, unique=True))
def test_lists_of_processors_are_read_as_they_are_written(cpus) -> None:
    assert parse_cpus(format_cpus(cpus)) == tuple(cpus)


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu in range(4):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert count_cores([0, 1, 2, 3], tmp_path) == 2
    assert count_cores([0, 2], tmp_path) == 1
    assert count_cores([7, 8], tmp_path) == 2  # the machine does not say


def group(tmp_path: Path, line: str) -> tuple[Path, Path]:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    return tmp_path / "proc", tmp_path / "sys"


def test_the_narrowest_quota_of_enclosing_groups_counts(tmp_path: Path) -> None:
    proc, sys_ = group(tmp_path, "0::/a/b")
    inner = sys_ / "fs/cgroup/a/b"
    inner.mkdir(parents=True)
    assert cpu_quota(proc, sys_) is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(proc, sys_) is None
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(proc, sys_) == 1.5
    (inner / "cpu.max").write_text("100000 100000\n")
    assert cpu_quota(proc, sys_) == 1.0


def test_a_container_sees_its_quota_at_the_root(tmp_path: Path) -> None:
    proc, sys_ = group(tmp_path, "0::/docker/not/visible")
    (sys_ / "fs/cgroup").mkdir(parents=True)
    (sys_ / "fs/cgroup/cpu.max").write_text("200000 100000\n")
    assert cpu_quota(proc, sys_) == 2.0


@pytest.mark.parametrize(
    ("written", "expected"), [("-1", None), ("50000", 0.5), ("nonsense", None)]
)
def test_control_groups_of_version_1(tmp_path: Path, written, expected) -> None:
    proc, sys_ = group(tmp_path, "4:cpu,cpuacct:/box\n9:memory:/other")
    folder = sys_ / "fs/cgroup/cpu,cpuacct/box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(written + "\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(proc, sys_) == expected


def test_no_control_groups_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path) is None


COMPUTE = """
import json, os, sys
from penstock import LLM, SamplingParams
with LLM("toy", max_num_seqs=2, max_model_len=128, cpu_bind=sys.argv[1]) as llm:
    llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    bound = [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")]
    import torch
    count = llm._engine._driver._runner.call(torch.get_num_threads)
print(json.dumps({"count": count, "bound": [sorted(cpus) for cpus in bound]}))
"""


def compute(bind: str, cpus: set[int]) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE, bind],
        env=environment | {"PYTHONPATH": str(ROOT / "src")},
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_confined_to_one_processor_it_computes_with_one_thread() -> None:
    cpu = min(os.sched_getaffinity(0))
    found = compute("auto", {cpu})
    assert found["count"] == 1
    assert all(cpus == [cpu] for cpus in found["bound"])


def test_each_thread_of_the_team_has_its_processor_and_others_are_free() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    wanted = allowed[:2]
    found = compute(format_cpus(wanted), set(allowed))
    assert found["count"] == len(wanted)
    if len(allowed) > 1:  # with one processor nothing is to be seen
        alone = [cpus for cpus in found["bound"] if len(cpus) == 1]
        assert sorted(alone) == [[cpu] for cpu in wanted]
        assert allowed in found["bound"]


def test_binding_without_kernels_is_refused() -> None:
    with pytest.raises(ConfigError, match="--cpu-bind 0-1 needs the native CPU kernels"):
        bind_team(None, (0, 1))
    bind_team(None, ())  # nothing was asked for


BIND = """
import os, sys
from penstock.engine.platforms.cpu import kernels, placement
from penstock.protocol.errors import ConfigError
try:
    placement.bind_team(kernels.load(), [int(cpu) for cpu in sys.argv[1:]])
except ConfigError as exc:
    print(exc.message)
"""


@pytest.mark.parametrize(
    ("limit", "others", "failed"), [("1", [], 1), ("2", [], 0), ("2", [1023], 1)]
)
def test_threads_that_could_not_be_bound_are_counted(limit: str, others: list[int], failed) -> None:
    """A team that OpenMP cuts short, and a processor that is not there."""
    cpu = min(os.sched_getaffinity(0))
    if 1023 in os.sched_getaffinity(0):
        pytest.skip("this machine has that processor")
    done = subprocess.run(
        [sys.executable, "-c", BIND, *map(str, [cpu, *(others or [cpu])])],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_THREAD_LIMIT": limit},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert f"{failed} of 2 threads" in done.stdout if failed else not done.stdout


def test_an_engine_that_cannot_be_bound_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda: None)
    before = set(threading.enumerate())
    cpu = min(os.sched_getaffinity(0))
    config = EngineConfig(model="toy", cpu_bind=str(cpu), max_model_len=128, max_num_seqs=2)
    with pytest.raises(ConfigError, match=f"--cpu-bind {cpu} "):
        build_engine(config)
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert "penstock-map" not in left and "penstock-compute" not in left
