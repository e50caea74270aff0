"""The command line as its users meet it: commands, flags, errors of one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import __version__
from penstock.cli import flags, ports, vllm_flags
from penstock.cli.main import COMMANDS, main
from penstock.cli.parser import Parser, count
from penstock.cli.serve import config_of, make_parser
from penstock.cli.worker import worker_config
from penstock.engine.config import EngineConfig
from penstock.protocol.errors import ConfigError

ROOT = Path(__file__).parents[2]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, _ = said(capsys, *arguments)
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"penstock {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == (0, f"penstock {__version__}\n", "")
    code, out, _ = said(capsys, "version")
    assert code == 0
    assert "torch 2." in out


def test_help_imports_nothing_heavy() -> None:
    """So that `penstock --help` answers at once; torch alone takes seconds."""
    script = (
        "import sys\n"
        "from penstock.cli.main import main\n"
        "for arguments in (['--help'], ['serve', '--help'], ['serve', 'toy', '--prot']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'uvicorn', 'transformers', 'tokenizers', 'zmq'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serv"], ["'serv'", "did you mean serve"]),
        (["serve"], ["which model"]),
        (["serve", "toy", "--prot", "1"], ["--prot", "did you mean --port"]),
        (["serve", "toy", "--xyzzy"], ["there is no flag --xyzzy"]),
        (["serve", "toy", "extra"], ["'extra'", "one argument too many"]),
        (["serve", "toy", "--dtype", "int3"], ["--dtype", "bfloat16"]),
        (["serve", "toy", "--max-model-len", "many"], ["--max-model-len", "'many'"]),
        (["serve", "toy", "--max-num-seqs", "0"], ["--max-num-seqs", "at least 1"]),
        (["serve", "toy", "--port", "70000"], ["70000", "not a port"]),
        (["serve", "toy", "--gpu-memory-utilization", "1.5"], ["gpu_memory_utilization"]),
        (["serve", "toy", "--quantization", "int5"], ["quantization 'int5'", "int4"]),
        (["serve", "toy", "--cpu-bind", "0-"], ["--cpu-bind 0-", "such as 0-3"]),
        (["chat", "toy", "--cpu-bind", "0-999999999"], ["--cpu-bind 0-999999999"]),
        (["worker", "toy", "--address=ipc:///x", "--cpu-bind", "no"], ["--cpu-bind no"]),
        (["serve", "toy", "-tp", "2"], ["-tp", "not supported yet"]),
        (["serve", "toy", "-O3"], ["-O3", "--graph-mode"]),
        (["serve", "toy", "-cc.mode=3"], ["-cc.mode", "--graph-mode"]),
        (["serve", "x.gguf", "--load-format", "gguf"], ["the .gguf file as MODEL"]),
        (["serve", "toy", "--enable_chunked_prefill"], ["no need", "always chunked"]),
        (["serve", "toy", "--shutdown-timeout", "5"], ["--drain-timeout"]),
        (["serve", "toy", "--config", "/no/such.yaml"], ["/no/such.yaml", "No such file"]),
        (["serve", "toy", "--in-process", "--engine-address", "ipc:///x"], ["choose"]),
        (["worker", "toy"], ["--address"]),
        (["chat", "--url", "localhost:1"], ["no URL"]),
    ],
)
def test_mistakes_get_one_line_that_says_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    code, out, err = said(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("penstock: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_a_missing_checkpoint(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, err = said(capsys, command, "/no/such/model", "--port", "0")
    assert code == 1
    assert "/no/such/model does not exist" in out + err
    assert "Traceback" not in out + err


def test_a_traceback_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = said(capsys, "serve", "/no/such/model", "--port", "0", "--log-level", "debug")
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("penstock: /no/such/model does not exist")


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("4096", 4096), ("8k", 8000), ("8K", 8192), ("2G", 2 << 30), ("1.5k", 1500),
     ("0.5GiB", 1 << 29), ("12MiB", 12 << 20), (" 7 ", 7), ("1m", 10**6)],
)  # fmt: skip
def test_counts(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e3", "1kb", "k", "0x10", "1 k", "nan"])
def test_counts_that_are_none(capsys: pytest.CaptureFixture[str], text: str) -> None:
    code, _, err = said(capsys, "serve", "toy", f"--max-num-seqs={text}")
    assert code == 2
    assert "--max-num-seqs" in err


# From flags to configurations and back ------------------------------------------------------------

_counts = st.none() | st.integers(1, 10**9)
_names = st.text("abcdefghijklmnop-_/.0123456789", min_size=1, max_size=12).filter(
    lambda text: not text.startswith("-")
)
_engine_configs = st.builds(
    EngineConfig,
    model=_names,
    revision=st.none() | _names,
    dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    max_model_len=_counts,
    max_num_seqs=_counts,
    max_num_batched_tokens=_counts,
    kv_cache_bytes=_counts,
    num_blocks=_counts,
    gpu_memory_utilization=st.floats(0.01, 1.0),
    enable_prefix_caching=st.booleans(),
    load_format=st.sampled_from(["auto", "safetensors", "dummy"]),
    seed=st.integers(-(2**62), 2**62),
    attention_backend=_names,
    graph_mode=st.sampled_from(["auto", "eager", "piecewise"]),
    kv_memory=st.sampled_from(["auto", "plain"]),
    num_threads=_counts,
)


@given(_engine_configs)
def test_a_worker_reads_exactly_what_the_service_was_told(config: EngineConfig) -> None:
    words = flags.engine_arguments(config)
    assert worker_config(["--address", "ipc:///x", *words]).engine == config


#: A value that is not the default, for every field.
OTHERWISE: dict[str, Any] = {
    "revision": "r", "dtype": "float32", "device": "cpu", "max_model_len": 64, "max_num_seqs": 3,
    "max_num_batched_tokens": 32, "kv_cache_bytes": 1 << 20, "kv_cache_dtype": "int8",
    "num_blocks": 7, "gpu_memory_utilization": 0.5, "enable_prefix_caching": False,
    "load_format": "dummy", "quantization": "int4", "seed": -1, "attention_backend": "torch",
    "graph_mode": "piecewise", "kv_memory": "plain", "num_threads": 2, "cpu_bind": "0-1",
    "host_share": 0.5,
    "trace": "t.json", "kv_host_cache_bytes": 1 << 20, "kv_disk_cache_bytes": 1 << 20,
    "kv_disk_path": "d", "kv_store": "mooncake://m:1", "kv_transfer": "tcp",
}  # fmt: skip
#: Settings that make sense together alone.
PAIRS = {"kv_disk_path": "kv_disk_cache_bytes", "kv_disk_cache_bytes": "kv_disk_path"}


@pytest.mark.parametrize("name", sorted(set(EngineConfig.__dataclass_fields__) - {"model"}))
def test_each_setting_reaches_the_worker(name: str) -> None:
    names = [name, PAIRS[name]] if name in PAIRS else [name]
    config = EngineConfig("toy", **{name: OTHERWISE[name] for name in names})
    assert config != EngineConfig("toy")
    words = flags.engine_arguments(config)
    assert worker_config(["--address", "ipc:///x", *words]).engine == config


@pytest.mark.parametrize(
    "words", [["--enforce-eager"], ["--graph-mode", "eager"], ["--graph-mode=piecewise"]]
)
def test_the_graph_mode_of_serve_is_the_workers(words: list[str]) -> None:
    serve, engine = config_of(make_parser(), ["toy", *words], {})
    assert engine.graph_mode == words[-1].rpartition("=")[2].removeprefix("--enforce-")
    assert worker_config(["--address", "ipc:///x", *serve.worker_args]).engine == engine


def test_every_engine_setting_has_a_flag() -> None:
    parser = Parser("worker", "")
    flags.add_engine_flags(parser)
    destinations = {action.dest for action in parser._actions}
    assert set(EngineConfig.__dataclass_fields__) - {"model"} <= destinations


def test_the_flags_of_the_worker_that_serve_starts() -> None:
    serve, engine = config_of(
        make_parser(),
        ["toy", "--dtype", "half", "--max_model_len=1K", "--no-enable-prefix-caching",
         "--port", "9000", "--log-level", "warning"],
        {},
    )  # fmt: skip
    assert serve.port == 9000
    assert engine == EngineConfig(
        "toy", dtype="float16", max_model_len=1024, enable_prefix_caching=False
    )
    worker = worker_config(
        ["--address", "ipc:///x", "--name", "e", "--incarnation", "3", "--parent-pid", "1",
         *serve.worker_args]
    )  # fmt: skip
    assert worker.engine == engine
    assert (worker.name, worker.incarnation, worker.log_level) == ("e", 3, "warning")


def test_defaults() -> None:
    serve, _ = config_of(make_parser(), ["toy"], {})
    assert (serve.host, serve.port) == ("127.0.0.1", 8000)
    assert serve.served_model_names == ("toy",)
    assert serve.api_keys == ()
    assert serve.seed is None


def test_the_model_may_be_a_flag_and_have_several_names() -> None:
    serve, engine = config_of(
        make_parser(), ["--model", "a/b", "--served-model-name", "x", "y"], {}
    )
    assert (serve.model, engine.model) == ("a/b", "a/b")
    assert serve.served_model_names == ("x", "y")


@pytest.mark.parametrize(
    ("arguments", "logged"),
    [([], False), (["--enable-log-requests"], True), (["--disable-log-requests"], False),
     (["--no-enable-log-requests"], False)],
)  # fmt: skip
def test_request_log(arguments: list[str], logged: bool) -> None:
    serve, _ = config_of(make_parser(), ["toy", *arguments], {})
    assert serve.log_requests is logged


def test_keys_from_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\n  spaced  \n")
    serve, _ = config_of(
        make_parser(),
        ["toy", "--api-key", "a", "b", "--api-key", "c", "--api-key-file", str(file)],
        {"PENSTOCK_API_KEY": "from-environment", "VLLM_API_KEY": "a"},
    )
    assert serve.api_keys == ("a", "b", "c", "from-file", "spaced", "from-environment")
    assert "from-file" not in repr(serve)
    assert not any("from-file" in word for word in serve.worker_args)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe"])
def test_a_key_file_without_keys(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="--api-key-file"):
        config_of(make_parser(), ["toy", "--api-key-file", str(file)], {})


@pytest.mark.parametrize("key", ["", " ", "two words", "sëcret", "new\nline"])
def test_keys_that_no_header_could_carry(key: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        config_of(make_parser(), ["toy", f"--api-key={key}"], {})


# Ports --------------------------------------------------------------------------------------------


def test_a_busy_port_names_its_holder_and_another_port(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        code, _, err = said(capsys, "serve", "toy", "--port", str(port))
    assert code == 2
    assert f"port {port} is taken by" in err
    assert f"(pid {os.getpid()})" in err
    suggested = int(err.rpartition("--port ")[2])
    ports.require_free("127.0.0.1", suggested)


def test_a_host_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, "serve", "toy", "--host", "192.0.2.1", "--port", "8765")
    assert code == 2
    assert "192.0.2.1" in err


# vLLM's flags -------------------------------------------------------------------------------------


def _all_vllm_flags() -> list[vllm_flags.VllmFlag]:
    return [flag for flags in vllm_flags.SECTIONS.values() for flag in flags]


def test_the_table_is_as_long_as_vllm() -> None:
    names = [name for flag in _all_vllm_flags() for name in flag.names]
    assert len(names) > 150
    assert len(set(names)) == len(names)


def test_what_the_table_calls_the_same_is_here_and_nothing_else_is() -> None:
    ours = set(make_parser().flags())
    for flag in _all_vllm_flags():
        for name in flag.names[:1]:
            assert (name in ours) == (flag.standing == "same"), name


def test_flags_that_answers_refer_to_exist() -> None:
    ours = set(make_parser().flags())
    for flag in _all_vllm_flags():
        mentioned = {word.strip(";:,.`()") for word in flag.answer.split() if word.startswith("--")}
        assert mentioned <= ours, flag


@pytest.mark.parametrize("flag", _all_vllm_flags(), ids=lambda flag: flag.names[0])
def test_every_flag_of_vllm_is_answered(
    capsys: pytest.CaptureFixture[str], flag: vllm_flags.VllmFlag
) -> None:
    if flag.standing == "same":
        return
    for name in flag.names:
        code, _, err = said(capsys, "serve", "toy", name)
        assert code == 2
        assert flag.answer in err


def test_the_page_about_vllm_holds_the_table() -> None:
    page = (ROOT / "docs" / "from-vllm.md").read_text()
    assert vllm_flags.markdown() in page, (
        "run: python -m penstock.cli.vllm_flags, and put the tables into docs/from-vllm.md"
    )
