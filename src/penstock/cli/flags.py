"""The engine's flags, shared by every command that starts one, and their way to a worker."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields

from penstock.cli.parser import Parser, count
from penstock.engine.config import (
    DEFAULT_MAX_NUM_BATCHED_TOKENS,
    DEFAULT_MAX_NUM_SEQS,
    DTYPE_ALIASES,
    EngineConfig,
)

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def _dtype(text: str) -> str:
    return DTYPE_ALIASES.get(text, text)


def _gib(text: str) -> int:
    size_bytes = float(text) * (1 << 30)
    if not 1 <= size_bytes < 1 << 62:
        raise argparse.ArgumentTypeError(f"{text} GiB is no size")
    return int(size_bytes)


def _load_format(text: str) -> str:
    if text == "gguf":
        raise argparse.ArgumentTypeError("name the .gguf file as MODEL")
    return text


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder in Hugging Face layout, a GGUF file, a hub id, or `toy`, the model "
        "that comes along",
    )
    # vLLM takes the model either way.
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help=argparse.SUPPRESS)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The destinations are the names of `EngineConfig`'s fields."""
    add = parser.add_argument_group("engine").add_argument
    _add_loading(add)
    _add_kv(add)
    _add_running(add)


def _add_loading(add: Callable[..., object]) -> None:
    """What is loaded, and as what."""
    add("--revision", help="branch, tag or commit on the hub")
    add(
        "--dtype",
        type=_dtype,
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of weights, activations and KV; auto takes the checkpoint's, if fast here",
    )
    add("--device", choices=("auto", "cpu", "cuda"), help="auto takes a GPU if there is one")
    add(
        "--max-model-len",
        type=count,
        metavar="TOKENS",
        help="prompt and output together; the model's own limit by default",
    )
    add(
        "--quantization",
        "-q",
        metavar="SCHEME",
        help="int8 or int4: quantize while loading; none: dequantize; auto: as it is stored",
    )
    add(
        "--load-format",
        type=_load_format,
        choices=("auto", "safetensors", "dummy"),
        help="dummy: random weights, config.json is enough",
    )
    add("--seed", type=int, help="of random weights, and of requests that bring none")


def _add_kv(add: Callable[..., object]) -> None:
    """Where KV is kept, and how it comes from elsewhere."""
    add(
        "--kv-cache-memory-bytes",
        dest="kv_cache_bytes",
        type=count,
        metavar="BYTES",
        help="size of the KV cache, such as 4G",
    )
    add(
        "--kv-cache-dtype",
        choices=("auto", "bfloat16", "int8"),
        help="auto takes the dtype of the weights; int8 holds nearly twice the tokens of bfloat16",
    )
    add(
        "--num-gpu-blocks-override",
        dest="num_blocks",
        type=count,
        metavar="BLOCKS",
        help="the same in blocks of 16 tokens, on any device",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help="of a GPU's memory for weights and KV (0.9)",
    )
    add(
        "--kv-host-cache-bytes",
        type=count,
        metavar="BYTES",
        help="keep KV that the cache has no room for in host memory, up to this much",
    )
    add(
        "--kv-offloading-size",
        dest="kv_host_cache_bytes",
        type=_gib,
        metavar="GIB",
        help="the same in GiB",
    )
    add(
        "--kv-disk-cache-bytes",
        type=count,
        metavar="BYTES",
        help="and on a disk, up to this much",
    )
    add("--kv-disk-path", metavar="FOLDER", help="where; it is found again after a restart")
    add(
        "--kv-store",
        metavar="URL",
        help="share KV with other instances in a Mooncake Store, mooncake://master:50051",
    )
    add(
        "--kv-transfer",
        metavar="MEANS",
        help="how KV comes from other instances, best first, of map, mooncake and tcp (map,tcp; "
        "at Unix sockets without a cluster secret map alone); off: it does not. mooncake listens "
        "on all interfaces without authentication or encryption: only where nobody else can reach "
        "it",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="share the KV of common prefixes (on)",
    )
    add("--kv-memory", choices=("auto", "plain"), help="plain: without mapped memory, slower")


def _add_running(add: Callable[..., object]) -> None:
    """What a step computes, and how."""
    add(
        "--max-num-seqs",
        type=count,
        metavar="N",
        help="sequences that run at once "
        f"(cpu {DEFAULT_MAX_NUM_SEQS['cpu']}, cuda {DEFAULT_MAX_NUM_SEQS['cuda']})",
    )
    add(
        "--max-num-batched-tokens",
        type=count,
        metavar="TOKENS",
        help="tokens computed in one step (cpu "
        f"{DEFAULT_MAX_NUM_BATCHED_TOKENS['cpu']}, cuda "
        f"{DEFAULT_MAX_NUM_BATCHED_TOKENS['cuda']})",
    )
    add(
        "--graph-mode",
        choices=("auto", "eager", "piecewise"),
        help="form of small steps: auto captures them where the platform can",
    )
    add(
        "--enforce-eager",
        dest="graph_mode",
        action="store_const",
        const="eager",
        help="the same as --graph-mode eager",
    )
    add("--attention-backend", metavar="NAME", help="auto takes the fastest that can")
    add("--trace", metavar="FILE", help="write what ran when, for ui.perfetto.dev")
    add("--num-threads", type=count, metavar="N", help="threads of the CPU's kernels")
    add("--host-share", type=float, help=argparse.SUPPRESS)
    add("--cpu-bind", metavar="CPUS", help="a processor for each of them: 0-3, none, or auto")


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="info; debug shows tracebacks")


def model_of(parser: Parser, options: argparse.Namespace, default: str | None = None) -> str:
    found = getattr(options, "model", None) or getattr(options, "model_flag", None) or default
    if found is None:
        parser.error("which model? Give a checkpoint folder, a GGUF file, a hub id, or toy")
    assert found is not None
    return str(found)


def engine_config(model: str, options: argparse.Namespace) -> EngineConfig:
    """What `options` says, and defaults for the rest. Raises `ConfigError`."""
    names = {field.name for field in fields(EngineConfig)} - {"model"}
    return EngineConfig(model, **{k: v for k, v in vars(options).items() if k in names})


def engine_arguments(config: EngineConfig) -> tuple[str, ...]:
    """The words that make `worker` parse this very configuration again."""
    words = [config.model]
    parser = Parser("worker", "")
    add_engine_flags(parser)
    flags: dict[str, Sequence[str]] = {}
    for action in parser._actions:  # the first of a destination takes all values: --graph-mode
        flags.setdefault(action.dest, action.option_strings)
    for field in fields(EngineConfig):
        value = getattr(config, field.name)
        if field.name == "model" or value == field.default:
            continue
        positive, *negative = flags[field.name]
        if isinstance(value, bool):
            words.append(positive if value else negative[0])
        else:
            words.append(f"{positive}={value}")
    return tuple(words)
