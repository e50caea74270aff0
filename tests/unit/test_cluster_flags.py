"""What the command line says about clusters, and metrics of several workers as one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from penstock.cli.serve import config_of, divided, for_router, make_parser
from penstock.engine.build import kv_sizing
from penstock.engine.config import EngineConfig
from penstock.protocol import secret
from penstock.protocol.errors import ConfigError
from penstock.service.assemble import build_core, policy_name
from penstock.service.config import ServeConfig
from penstock.service.siblings import merge


@pytest.fixture(autouse=True)
def no_secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(secret.VARIABLE, raising=False)
    yield
    os.environ.pop(secret.VARIABLE, None)
    secret.use(None)


def read(*words: str, command: str = "serve", env: dict[str, str] | None = None) -> ServeConfig:
    return config_of(make_parser(command), ["toy", *words], env or {})[0]


def test_instances_policies_and_slos() -> None:
    config = read("--instances", "3", "--pd", "static=2:1", "--slo", "ttft=1s,tpot=50ms")
    core = build_core(config)
    assert config.cluster.instances == 3
    assert (core.config.ttft_slo_s, core.config.tpot_slo_s) == (1.0, 0.05)
    roles = core.config.roles.policy
    assert roles is not None and (roles.static, roles.tpot_slo_s) == ((2, 1), 0.05)
    assert core.prospects.finder.listens, "with several instances there is an index"
    assert read("--slo-ttft", "800ms").cluster.ttft_slo_s == 0.8


def test_one_instance_has_neither_roles_nor_an_index() -> None:
    core = build_core(read())
    assert core.config.roles.policy is None
    assert not core.prospects.finder.listens
    assert build_core(read("--kv-index")).prospects.finder.listens


def test_without_pd_nothing_is_split() -> None:
    config = read("--instances", "2", "--pd", "off")
    assert policy_name(config.cluster) == "kv-aware"
    assert build_core(config).config.roles.policy is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--pd", "static=0:2"], "at least one of|at least one instance"),
        (["--pd", "static=2"], "static=P:D"),
        (["--pd", "static=1:1"], "needs 2 instances, and there is 1"),
        (["--pd", "static=2:2", "--instances", "3"], "needs 4 instances, and there are 3"),
        (["--pd", "static=1:1", "--engine-address", "tcp://127.0.0.1:1"], "there is 1"),
        (["--pd", "off", "--policy", "split", "--instances", "2"], "never splits"),
        (["--pd", "static=1:1", "--policy", "kv-aware", "--instances", "2"], "never splits"),
        (["--instances", "-1"], "--instances: must be at least 1"),
        (["--instances", "0"], "--instances: must be at least 1"),
        (["--instances=-1"], "--instances: must be at least 1"),
        (["--slo", "ttft=fast"], "no time"),
        (["--slo", "e2e=1s"], "ttft=1s,tpot=50ms"),
        (["--ssl-keyfile", __file__], "belong together"),
        (["--ssl-keyfile", "/no/key", "--ssl-certfile", "/no/cert"], "no such file"),
        (["--in-process", "--instances", "2"], "one process"),
        (["--registry", "etcd://h:2379"], "starts its own engines"),
        (["--cluster-secret-file", "/no/such/file"], "cannot be read"),
        (["--admin-key-file", "/no/such/file"], "cannot be read"),
    ],
)
def test_mistakes_are_said(words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(*words)


def test_a_policy_that_is_none() -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        build_core(read("--policy", "fastest"))


def test_keys_of_admin_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the operators\none\n\ntwo\n")
    config = read("--admin-key-file", str(file), env={"PENSTOCK_ADMIN_KEY": "three"})
    assert config.admin_keys == ("one", "two", "three")
    assert "three" not in repr(config)


def test_the_secret_reaches_our_children_and_no_text(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef0123\n")
    config = read("--cluster-secret-file", str(file))
    assert os.environ[secret.VARIABLE] == "0123456789abcdef0123"
    assert secret.current() is not None
    assert "0123456789abcdef" not in repr(config) + repr(secret.current())
    file.write_text("short")
    with pytest.raises(ConfigError, match="at least 16"):
        read("--cluster-secret-file", str(file))


def test_a_router_without_a_registry_offers_one() -> None:
    config = for_router(read("--registry-address", "tcp://127.0.0.1:8999", command="router"))
    assert config.cluster.registry == "penstock://127.0.0.1:8999"
    assert config.cluster.offers_registry
    named = for_router(read("--registry", "etcd://h:2379", command="router"))
    assert not named.cluster.offers_registry
    with pytest.raises(ConfigError, match="starts no engines"):
        for_router(read("--instances", "2", command="router"))


def test_engines_of_one_host_divide_what_nobody_has_set() -> None:
    whole = kv_sizing(EngineConfig("toy", device="cpu"))
    part = divided(EngineConfig("toy", device="cpu"), 4)
    assert part.num_threads is not None and part.num_threads >= 1
    assert kv_sizing(part).share == pytest.approx(whole.share / 4)
    assert kv_sizing(part).default_cap_bytes == whole.default_cap_bytes // 4
    said = divided(EngineConfig("toy", num_threads=2, kv_cache_bytes=1 << 30), 4)
    assert (said.num_threads, kv_sizing(said).kv_cache_bytes) == (2, 1 << 30)
    with pytest.raises(ConfigError, match="one engine"):
        divided(EngineConfig("toy", cpu_bind="0"), 2)
    assert divided(EngineConfig("toy"), 1) == EngineConfig("toy")


def _exposition(number: int) -> str:
    registry = CollectorRegistry()
    Counter("requests", "Requests.", ["model"], registry=registry).labels("m").inc(number)
    Gauge("plain", "No labels.", registry=registry).set(number)
    Histogram("time", "Times.", buckets=(1, 2), registry=registry).observe(number)
    return generate_latest(registry).decode()


def test_metrics_of_workers_are_one_exposition() -> None:
    """Against prometheus_client's own parser."""
    merged = merge({0: _exposition(1), 2: _exposition(5)})
    families = {f.name: f for f in text_string_to_metric_families(merged)}
    found: dict[str, Any] = {
        (s.name, s.labels["api_worker"]): s.value
        for f in families.values()
        for s in f.samples
        if s.name in ("requests_total", "plain", "time_sum")
    }
    assert found == {
        ("requests_total", "0"): 1, ("requests_total", "2"): 5, ("plain", "0"): 1,
        ("plain", "2"): 5, ("time_sum", "0"): 1, ("time_sum", "2"): 5,
    }  # fmt: skip
    assert merged.count("# TYPE requests_total ") == 1
