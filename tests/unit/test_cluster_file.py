"""`cluster.yaml`: what is written is what is read, and what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.loadgen.costs import known_hardware
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.simulator.build import check_fits
from penstock.simulator.cluster_file import parse_cluster, read_cluster, write_cluster
from penstock.simulator.quantities import seconds_of, slos_of, text_of
from penstock.simulator.spec import ClusterSpec, FaultSpec, LinkSpec, PoolSpec

ROOT = Path(__file__).parents[2]
SMALL = "pools: [{count: 2, hardware: 'h100:llama3.1-8b:bf16', tp: 1}]\n"

# --- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("50ms", 0.05), ("1s", 1), ("10m", 600), ("1.5 h", 5400), ("200us", 2e-4), (".5s", 0.5)],
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert seconds_of(text, "x") == seconds


@pytest.mark.parametrize("text", ["50", "ms", "-1s", "1e3s", "", "1 2s", "nan", "infs", 5, None])
def test_what_is_no_time(text: object) -> None:
    with pytest.raises(ConfigError, match=r"--window is .* write a time with its unit"):
        seconds_of(text, "--window")


@given(st.floats(1e-6, 1e9))
def test_times_are_read_back_exactly(seconds: float) -> None:
    assert seconds_of(text_of(seconds), "x") == pytest.approx(seconds, rel=1e-12)


def test_slos() -> None:
    assert slos_of("ttft=1s,tpot=50ms") == slos_of(" tpot=50ms, ttft=1000ms") == (1.0, 0.05)
    for text in ("ttft=1s", "ttft=1s,tpot=0ms", "ttft=1s,ttft=2s", "ttft=1s,tpot=5", "x"):
        with pytest.raises(ConfigError):
            slos_of(text)


# --- files ----------------------------------------------------------------------------------------

NAMES = sorted(n for n in known_hardware() if ":llama3.1-8b:" in n)
COUNTS = st.integers(1, 10**6)
POOLS = st.builds(
    PoolSpec,
    count=st.integers(1, 1000),
    hardware=st.sampled_from(NAMES),
    max_num_batched_tokens=COUNTS,
    max_num_seqs=COUNTS,
    max_model_len=COUNTS,
    enable_prefix_caching=st.booleans(),
    kv_tokens=st.none() | st.integers(16, 10**6),
    host_kv_tokens=st.integers(0, 10**6),
    disk_kv_tokens=st.integers(0, 10**6),
    slowdown=st.floats(0.1, 10),
    gpu_hour_usd=st.none() | st.floats(0.01, 100),
)
FAULTS = st.builds(
    FaultSpec,
    at_s=st.integers(0, 9999).map(float),
    kind=st.sampled_from(["crash", "freeze"]),
    instance=st.just(0),
    for_s=st.none() | st.integers(1, 99).map(float),
) | st.builds(
    FaultSpec,
    at_s=st.integers(0, 9999).map(float),
    kind=st.just("slow"),
    instance=st.just(0),
    for_s=st.none() | st.integers(1, 99).map(float),
    times=st.floats(0.5, 9),
)
MILLISECONDS = st.integers(1, 10**6).map(lambda n: n / 1e3)


@st.composite
def clusters(draw: st.DrawFn) -> ClusterSpec:
    found = draw(st.lists(POOLS, min_size=1, max_size=3))
    names = draw(st.lists(st.text("abc: {}#'\"-é", min_size=1).filter(str.strip), min_size=3,
                          max_size=3, unique=True))  # fmt: skip
    total = sum(pool.count for pool in found)
    splits = [f"1:{total - 1}"] if total > 1 else []
    return ClusterSpec(
        name=names[0],
        pools=tuple(replace(pool, name=name) for pool, name in zip(found, names)),
        policy=draw(st.sampled_from(["slo-aware", "least-load", "round-robin"])),
        pd=draw(st.sampled_from(["off", "auto", *splits])),
        ttft_slo_s=draw(st.none() | MILLISECONDS),
        tpot_slo_s=draw(st.none() | MILLISECONDS),
        admission=draw(st.booleans()),
        kv_index=draw(st.booleans()),
        max_queue=draw(COUNTS),
        link=LinkSpec(
            latency_s=draw(MILLISECONDS),
            jitter_s=draw(MILLISECONDS),
            kv_gbit=draw(st.floats(1, 9)),
            host_kv_gbit=draw(st.floats(1, 9)),
            disk_kv_gbit=draw(st.floats(1, 9)),
        ),
        faults=tuple(
            replace(fault, instance=f"{names[0]}-0") for fault in draw(st.lists(FAULTS, max_size=2))
        ),
    )


@given(clusters())
@settings(max_examples=60)
def test_what_is_written_is_what_is_read(spec: ClusterSpec) -> None:
    assert parse_cluster(yaml.safe_load(write_cluster(spec))) == spec


def test_the_example_says_what_it_means() -> None:
    spec = read_cluster(ROOT / "examples" / "simulate.yaml")
    (pool,) = spec.pools
    assert (pool.count, pool.hardware) == (4, "h100:llama3.1-8b:bf16:tp1")
    assert (spec.ttft_slo_s, spec.tpot_slo_s, spec.pd) == (1.0, 0.05, "auto")


def test_the_faults_of_the_example_can_be_put_in(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "simulate.yaml").read_text()
    head, faults = text.split("# faults:")
    (tmp_path / "f.yaml").write_text(head + "faults:" + faults.replace("\n#", "\n"))
    kinds = [(f.kind, f.instance, f.at_s, f.for_s, f.times)
             for f in read_cluster(tmp_path / "f.yaml").faults]  # fmt: skip
    assert kinds == [
        ("crash", "h100-0", 60, 20, 1),
        ("slow", "h100-1", 90, 30, 3),
        ("freeze", "h100-2", 120, 5, 1),
    ]


def test_what_the_example_leaves_out_is_as_it_says(tmp_path: Path) -> None:
    """Fields that are commented out, put in as they stand, change nothing."""
    text = (ROOT / "examples" / "simulate.yaml").read_text()
    lines = []
    for line in text.splitlines():
        body = line.strip()
        if body.startswith("# ") and ": " in body and body[2:].lstrip()[0].islower():
            key = body[2:].lstrip().split(":")[0]
            if " " not in key and key not in ("tp", "kv-tokens", "gpu", "faults"):
                line = line.replace("# ", "", 1)
        if body == "# link:                     # between two processes":
            line = body[2:]
        lines.append(line)
    (tmp_path / "all.yaml").write_text("\n".join(lines))
    said = yaml.safe_load((tmp_path / "all.yaml").read_text())
    assert {"admission", "kv-index", "max-queue", "link"} <= said.keys()
    assert {"max-num-seqs", "slowdown", "role", "host-kv-tokens"} <= said["pools"][0].keys()
    assert read_cluster(tmp_path / "all.yaml") == read_cluster(ROOT / "examples" / "simulate.yaml")


def test_a_cost_model_of_ones_own_is_relative_to_the_file(tmp_path: Path, monkeypatch) -> None:
    cost = dict(base_s=0.01, per_token_s=1e-5, kv_tokens=5000, kv_bytes_per_token=9)
    (tmp_path / "mine.json").write_text(json.dumps(cost))
    (tmp_path / "c.yaml").write_text("pools: [{count: 1, hardware: mine.json}]")
    spec = read_cluster(tmp_path / "c.yaml")
    assert Path(spec.pools[0].hardware) == tmp_path / "mine.json"
    monkeypatch.chdir(tmp_path)
    assert read_cluster(Path("c.yaml")).pools[0].hardware == "./mine.json"


def test_pools_may_have_roles_of_their_own() -> None:
    text = """
    pd: pools
    pools:
      - {name: p, count: 1, role: prefill, hardware: "h200:llama3.1-8b:bf16:tp1"}
      - {name: d, count: 3, role: decode, hardware: "h100:llama3.1-8b:bf16:tp1"}
    """
    spec = parse_cluster(yaml.safe_load(text))
    assert [pool.role for pool in spec.pools] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is not a list of fields"),
        ("[1, 2]", "the file is not a list of fields"),
        ("polcy: x", r"polcy: there is no such field \(did you mean policy\?\)"),
        ("name: x", "there is no field pools"),
        ("pools: []", "pools is not a list of pools"),
        ("pools: {count: 1}", "pools is not a list of pools"),
        ("pools: [{count: 1}]", r"pools\[0\] lacks hardware"),
        ("pools: [{hardware: x}]", r"pools\[0\] lacks count"),
        ("pools: [5]", r"pools\[0\] is not a list of fields"),
        ("pools: [{count: 0, hardware: x}]", r"pools\[0\].count is 0, not a whole number of at"),
        ("pools: [{count: true, hardware: x}]", "count is True"),
        ("pools: [{count: 1, hardware: x, hots-kv-tokens: 1}]",
         r"pools\[0\].hots-kv-tokens: .* \(did you mean host-kv-tokens"),
        ("pools: [{count: 1, hardware: abacus}]", "hardware abacus is not known.*write a100"),
        ("pools: [{count: 1, hardware: 'h100:llama3.1-8b:bf17'}]", "of bf17 write bf16 or fp8;"),
        ("pools: [{count: 1, hardware: 'h100:llama3.1-70b:bf16', tp: 1}]",
         "70b:bf16:tp1 does not hold the model, whose weights take 141 GB .* 72 GB .* write tp4"),
        ("pools: [{count: 1, hardware: 'h100:llama3.1-70b:bf16', tp: 3}]",
         "bf16:tp3 is not known: in place of tp3 write tp4 or tp8"),
        ("pools: [{count: 1, hardware: 'h100:llama3.1-8b:bf16:tp1', tp: 2}]", "says it too"),
        ("routers: {count: 1}", "is a cluster for `penstock up`"),
        (SMALL + "gpu_hour_usd: 3", "no such field: it belongs to each of pools"),
        (SMALL + "colour: blue", "no such field; there are name, pools, policy"),
        (SMALL + "admission: true", "admission refuses what would miss slo.ttft"),
        (SMALL + "admission: true\nslo: {tpot: 1s}", "admission refuses what would miss slo.ttft"),
        ("pools: [{count: 1, hardware: 'h100:llama3.1-8b'}]", "may be .*bf16.*say which"),
        ("pools: [{count: 1, hardware: x.json, tp: 2}]", "is of a TP already"),
        ("pools: [{count: 1, hardware: ./nothing.json}]", r"yaml: \S+ cannot be read"),
        ("pools: [{count: 1, hardware: h, slowdown: 0}]", "slowdown is 0, not a number of more"),
        ("pools: [{count: 1, hardware: h, gpu-hour-usd: .nan}]", "gpu-hour-usd is nan"),
        ("pools: [{count: 1, hardware: h, role: leader}]", "not one of any, prefill, decode"),
        ("pools: [{count: 1, hardware: h, enable-prefix-caching: 1}]", "neither true nor false"),
        (SMALL + "pd: 2:6", r'pd is 126, to YAML: write splits in quotes, "2:6"'),
        (SMALL + "pd: '2:6'", "there are 2 instances"),
        (SMALL + "pd: sometimes", "write off, auto"),
        (SMALL.replace("2", "1000000000", 1), r"pools\[0\].count is more than 100000"),
        (SMALL.replace("tp: 1", "tp: 1, slowdown: 1.0e+30"), r"slowdown is 1e\+30, not from 0.001"),
        (SMALL.replace("tp: 1", "tp: 1, kv-tokens: 10000000000"), "kv-tokens is more than 1000000"),
        (SMALL + "link: {latency: 9h}", "latency is 9h, more than an hour"),
        ("pools: [{count: 1, hardware: /dev/zero}]", "/dev/zero is no file"),
        ("pools: [{name: a, count: 1, hardware: 'h100:llama3.1-8b:bf16:tp1'}, "
         "{name: b, count: 1, hardware: 'h100:llama3.1-70b:fp8:tp2'}]", "are of different models"),
        (SMALL + "pd: pools", "one pool's role is prefill"),
        (SMALL + "policy: best", "yaml: 'best' is not a policy: choose one of"),
        (SMALL + "slo: {ttft: 1}", "slo.ttft is 1: write a time|slo.ttft is '?1'?: write a time"),
        (SMALL + "slo: {ttft: 0s}", "slo.ttft has to be more than 0"),
        (SMALL + "slo: {ttff: 1s}", r"slo.ttff: .* \(did you mean ttft"),
        (SMALL + "link: {latency: fast}", "link.latency is 'fast'"),
        (SMALL + "link: {kv-gbit: 0}", "link.kv-gbit is 0"),
        (SMALL + "admission: maybe", "admission is 'maybe'"),
        (SMALL + "kv-index: true\nkv_index: true", "kv_index is there twice"),
        (SMALL + "max-queue: -1", "max-queue is -1"),
        (SMALL + "faults: {at: 1s}", "faults is not a list of faults"),
        (SMALL + "faults: [{at: 1s}]", r"faults\[0\] has an `at`, and one of crash"),
        (SMALL + "faults: [{at: 1s, crash: gpu-0, slow: gpu-0}]", "one of crash, freeze and slow"),
        (SMALL + "faults: [{at: 1s, slow: gpu-0}]", "slow has `times`"),
        (SMALL + "faults: [{at: 1s, crash: gpu-9}]", "'gpu-9'; there are gpu-0 to gpu-1"),
        (SMALL + "faults: [{at: 1s, carsh: gpu-0}]", r"did you mean crash\?"),
        ("pools: [{count: 1, hardware: 'a'", "is not YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_cluster(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_cluster(tmp_path / "nothing.yaml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_cluster(tmp_path / "bytes")


# --- what fits ------------------------------------------------------------------------------------


def cluster(**more) -> ClusterSpec:
    values = dict(count=1, hardware="h100:llama3.1-70b:fp8:tp2")
    return ClusterSpec(pools=(PoolSpec(**(values | more)),))


def test_the_longest_request_has_to_fit_and_what_would_do_is_said() -> None:
    trace = [TraceRequest(0, 10, 10), TraceRequest(1, 400_000, 1000)]
    with pytest.raises(ConfigError, match="raise it to 401000 or more"):
        check_fits(cluster(), trace)
    with pytest.raises(ConfigError) as caught:
        check_fits(cluster(max_model_len=10**6), trace)
    said = caught.value.message
    assert "400000 + 1000 tokens" in said and "room for 223984 tokens" in said
    able = [name for name, v in known_hardware().items()
            if ":llama3.1-70b:" in name and v["kv_tokens"] >= 401_000]  # fmt: skip
    assert able and all(name in said for name in able)
    assert "h100:llama3.1-70b:fp8:tp2," not in said
    check_fits(cluster(hardware=able[0], max_model_len=10**6), trace)


def test_kv_that_was_made_too_small_is_said_to_be() -> None:
    with pytest.raises(ConfigError, match="raise kv-tokens, or leave it out"):
        check_fits(cluster(kv_tokens=160), [TraceRequest(0, 200, 1)])
    check_fits(cluster(kv_tokens=160), [TraceRequest(0, 150, 10)])
