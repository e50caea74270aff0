"""Settings of one engine instance. Plain data: no torch, so that the command line may import it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from penstock.engine.platforms.cpu.placement import parse_cpus
from penstock.protocol.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
KvCacheDtype = Literal["auto", "bfloat16", "int8"]
Device = Literal["auto", "cpu", "cuda"]
GraphMode = Literal["auto", "eager", "piecewise"]
LoadFormat = Literal["auto", "safetensors", "dummy"]

#: vLLM's short names.
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
#: What `quantization` may say, in the words of `quantization.select`, whose import brings torch.
QUANTIZATIONS = (
    "auto", "none", "int8", "int4", "awq", "gptq", "compressed-tensors", "fp8", "gguf",
    "awq_marlin", "gptq_marlin", "compressed_tensors", "finegrained_fp8",
)  # fmt: skip

#: How blocks may come from a peer, in the words of `transfer.jobs.Means`.
KV_TRANSFER_MEANS = ("map", "mooncake", "tcp")

#: On a CPU decode is bound by memory bandwidth up to a few dozen rows and by arithmetic after that:
#: more rows would add latency and no throughput. A GPU's ridge lies higher. vLLM has 256 for both.
DEFAULT_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
#: A step's worth of prefill. On a CPU some hundred tokens already saturate the vector units, and a
#: larger step only takes more memory and makes the streams beside it wait longer for their token.
DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one instance runs a model. None means: decided from the model and the device.

    `model` is a folder, a hub id or `toy` (see `penstock.checkpoint.resolve`). Of `num_blocks` and
    `kv_cache_bytes` the first wins. `num_threads` is for CPU kernels; None: one a core.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    #: "auto": the dtype of the weights; "int8": half of bfloat16, one scale a token and kv head.
    kv_cache_dtype: KvCacheDtype = "auto"
    num_blocks: int | None = None
    #: Slower tiers of the KV cache, in bytes; None: there is none. The disk tier is one file in the
    #: folder `kv_disk_path`; `kv_store` is a store shared with other instances, mooncake://host:port.
    kv_host_cache_bytes: int | None = None
    kv_disk_cache_bytes: int | None = None
    kv_disk_path: str | None = None
    kv_store: str | None = None
    #: How blocks come from peers, best first: "map" (same host), "mooncake", "tcp"; or "off".
    kv_transfer: str = "map,tcp"
    #: Share for KV of what the weights leave of a GPU's memory.
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    load_format: LoadFormat = "auto"
    #: "auto": as the checkpoint is stored; int8 or int4: quantized while loading; "none":
    #: dequantized if need be. A format's name must be the checkpoint's own.
    quantization: str = "auto"
    #: Of the random weights of load_format "dummy"; requests bring seeds of their own.
    seed: int = 0
    attention_backend: str = "auto"
    #: Which forms of a step are allowed (`runtime.forms`); auto takes the fastest that works.
    graph_mode: GraphMode = "auto"
    #: "plain": contiguous tensors in place of mapped memory (CPU only; the oracle of its tests).
    kv_memory: Literal["auto", "plain"] = "auto"
    num_threads: int | None = None
    #: What this instance may take of the host's memory where no size is given: one of N that start
    #: together takes 1/N.
    host_share: float = 1.0
    #: auto, none, or the processors of the CPU's compute threads, such as "0-3".
    cpu_bind: str = "auto"
    #: Where a trace of what ran when is written; None: nowhere.
    trace: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "trace", "kv_disk_path"):
            if isinstance(path := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(path))
        for name, hint in _HINTS.items():
            _check_type(name, getattr(self, name), hint)
        for name in (
            "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes",
            "num_blocks", "num_threads", "kv_host_cache_bytes", "kv_disk_cache_bytes",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if (self.kv_disk_cache_bytes is None) != (self.kv_disk_path is None):
            raise ConfigError(
                "--kv-disk-cache-bytes and --kv-disk-path go together: how much, and where"
            )
        if self.kv_store is not None and not re.match(r"mooncake://[^/]", self.kv_store):
            raise ConfigError(f"--kv-store {self.kv_store}: give mooncake://host:port")
        tiers = (self.kv_host_cache_bytes, self.kv_disk_cache_bytes, self.kv_store)
        if not self.enable_prefix_caching and any(tier is not None for tier in tiers):
            raise ConfigError("host, disk and store keep the prefix cache, which is switched off")
        means = [part.strip() for part in self.kv_transfer.split(",")]
        if self.kv_transfer != "off" and not {*means} <= {*KV_TRANSFER_MEANS}:
            raise ConfigError(
                f"kv_transfer {self.kv_transfer!r}: name some of {', '.join(KV_TRANSFER_MEANS)}, "
                "or off"
            )
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization {self.quantization!r} is none of {', '.join(QUANTIZATIONS)}"
            )
        if self.cpu_bind not in ("auto", "none"):
            if re.search(r"\d{5}", self.cpu_bind):  # no list of a billion
                raise ConfigError(f"--cpu-bind {self.cpu_bind}: no processor has that number")
            parse_cpus(self.cpu_bind)

    def for_device(self, device_type: Literal["cpu", "cuda"]) -> EngineConfig:
        """A copy with the limits filled in that depend on the device alone."""
        max_num_seqs = self.max_num_seqs or DEFAULT_MAX_NUM_SEQS[device_type]
        max_num_batched_tokens = self.max_num_batched_tokens or max(
            DEFAULT_MAX_NUM_BATCHED_TOKENS[device_type], max_num_seqs
        )
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) is less than max_num_seqs "
                f"({max_num_seqs}): a step could not give every running sequence one token"
            )
        return replace(
            self,
            device=device_type,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )


_HINTS = get_type_hints(EngineConfig)
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}


def _check_type(name: str, value: object, hint: Any) -> None:
    """Raises `ConfigError`; what the command line says has passed its parser, what Python code says
    has passed nothing."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} {value!r} is none of {', '.join(get_args(hint))}")
        return
    kinds = get_args(hint) or (hint,)
    taken = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, taken) or (isinstance(value, bool) and bool not in kinds):
        words = " or ".join(_KINDS[kind] for kind in kinds if kind is not NoneType)
        raise ConfigError(f"{name} must be {words}, not {value!r}")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One engine instance as a process: who it is, and where services find it."""

    engine: EngineConfig
    #: Where to listen: `ipc:///path`, `tcp://127.0.0.1:port`, or `memory://name`.
    address: str
    name: str = "engine-0"
    #: Grows with every start of the same name; services drop what an older one sent. 0: the clock.
    incarnation: int = 0
    #: End when this process is gone (the service that started the worker); None: never.
    parent_pid: int | None = None
    #: Where it says that it is there (see `penstock.registry.open`); None: services know anyway.
    registry: str | None = None
    #: A memfd of whoever started this process, for weights that engines share; None: there is none.
    weights_fd: int | None = None
    log_level: str = "info"
