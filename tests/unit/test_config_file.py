"""--config FILE: three formats, one meaning; the command line wins; typos are caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.serve import config_of, make_parser
from penstock.engine.config import EngineConfig, WorkerConfig
from penstock.protocol.errors import ConfigError
from penstock.service.config import ServeConfig

YAML = """
model: toy
port: 9000
served-model-name: [a, b]
max_model_len: 1K
enable-prefix-caching: false
in-process: true
api-key: secret
gpu-memory-utilization: 0.5
uds: null
"""
TOML = """
model = "toy"
port = 9000
served-model-name = ["a", "b"]
max_model_len = "1K"
enable-prefix-caching = false
in-process = true
api-key = "secret"
gpu-memory-utilization = 0.5
"""
JSON = """{"model": "toy", "port": 9000, "served-model-name": ["a", "b"], "max_model_len": "1K",
"enable-prefix-caching": false, "in-process": true, "api-key": "secret",
"gpu-memory-utilization": 0.5}"""


def read(
    tmp_path: Path, text: str, suffix: str = ".yaml", *arguments: str
) -> tuple[ServeConfig, EngineConfig]:
    file = tmp_path / f"settings{suffix}"
    file.write_text(text)
    return config_of(make_parser(), [*arguments, "--config", str(file)], {})


@pytest.mark.parametrize(
    ("text", "suffix"), [(YAML, ".yaml"), (YAML, ".yml"), (TOML, ".toml"), (JSON, ".json")]
)
def test_the_formats_mean_the_same(tmp_path: Path, text: str, suffix: str) -> None:
    serve, engine = read(tmp_path, text, suffix)
    assert serve.port == 9000
    assert serve.served_model_names == ("a", "b")
    assert serve.in_process
    assert serve.api_keys == ("secret",)
    assert serve.uds is None
    assert engine == EngineConfig(
        "toy", max_model_len=1024, enable_prefix_caching=False, gpu_memory_utilization=0.5
    )


def test_the_command_line_wins(tmp_path: Path) -> None:
    serve, engine = read(
        tmp_path, YAML, ".yaml", "other", "--port", "1234", "--enable-prefix-caching",
        "--no-in-process", "--served-model-name", "c",
    )  # fmt: skip
    assert (serve.model, engine.model) == ("other", "other")
    assert serve.port == 1234
    assert serve.served_model_names == ("c",)
    assert engine.enable_prefix_caching
    assert not serve.in_process
    assert engine.max_model_len == 1024


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "", ".yaml", "toy") == config_of(make_parser(), ["toy"], {})


@pytest.mark.parametrize(
    ("text", "suffix", "words"),
    [
        ("prot: 1", ".yaml", ["prot", "did you mean port"]),
        ("tensor-parallel-size: 2", ".yaml", ["tensor-parallel-size", "not supported yet"]),
        ("config: other.yaml", ".yaml", ["config"]),
        ("port: nine", ".yaml", ["port", "nine"]),
        ("port: {a: 1}", ".yaml", ["port", "dict"]),
        ("- a\n- b", ".yaml", ["flags by name"]),
        ("a: [", ".yaml", ["cannot be parsed"]),
        ("port = ", ".toml", ["cannot be parsed"]),
        ("{", ".json", ["cannot be parsed"]),
        ("port: 1", ".ini", ["name it .yaml"]),
        ("dtype: int3", ".yaml", ["dtype", "bfloat16"]),
    ],
)
def test_mistakes_name_the_file_and_the_key(
    tmp_path: Path, text: str, suffix: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, suffix, "toy")
    message = caught.value.message
    assert f"settings{suffix}" in message
    assert "\n" not in message
    assert all(word in message for word in words)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        config_of(make_parser(), ["toy", "--config", str(file)], {})


# The configurations themselves --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_model_len", 0), ("max_num_seqs", -1), ("kv_cache_bytes", 0), ("num_threads", 0),
     ("gpu_memory_utilization", 0.0), ("gpu_memory_utilization", 1.1)],
)  # fmt: skip
def test_engine_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        EngineConfig("toy", **{field: value})  # type: ignore[arg-type]


def test_defaults_of_a_device_and_what_was_said() -> None:
    cpu = EngineConfig("toy").for_device("cpu")
    cuda = EngineConfig("toy", max_num_seqs=7).for_device("cuda")
    assert (cpu.device, cpu.max_num_seqs, cpu.max_num_batched_tokens) == ("cpu", 64, 1024)
    assert (cuda.device, cuda.max_num_seqs) == ("cuda", 7)
    # Many sequences take a step that gives each of them a token.
    assert EngineConfig("toy", max_num_seqs=9999).for_device("cpu").max_num_batched_tokens == 9999


def test_a_step_too_small_for_all_sequences() -> None:
    config = EngineConfig("toy", max_num_seqs=64, max_num_batched_tokens=63)
    with pytest.raises(ConfigError, match="63"):
        config.for_device("cpu")


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_that_are_none(port: int) -> None:
    with pytest.raises(ConfigError, match="port"):
        ServeConfig("toy", ("toy",), port=port)


def test_a_service_has_a_name_for_its_model() -> None:
    with pytest.raises(ConfigError):
        ServeConfig("toy", ())


def test_configurations_do_not_change() -> None:
    worker = WorkerConfig(EngineConfig("toy"), "ipc:///x")
    with pytest.raises(AttributeError):
        worker.name = "other"  # type: ignore[misc]
