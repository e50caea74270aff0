"""From a configuration to a core and a runner: the one place where an engine is put together."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.checkpoint import Checkpoint, resolve
from penstock.engine.attention.base import AttentionBackend
from penstock.engine.config import EngineConfig
from penstock.engine.core import CoreConfig, InstanceCore
from penstock.engine.layers.attention import build_attention
from penstock.engine.loading.digest import computed_beside, model_digest
from penstock.engine.loading.loader import load_model
from penstock.engine.loading.shared_weights import Segment
from penstock.engine.memory.base import KvMemory
from penstock.engine.memory.contiguous import ContiguousMemory
from penstock.engine.memory.premap import NoPremapper, Premapper
from penstock.engine.memory.sizing import KvSizing, blocks_for, choose_num_blocks
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.models.base import Model
from penstock.engine.models.config import ModelConfig
from penstock.engine.platforms.base import Platform
from penstock.engine.platforms.cpu import kernels, placement
from penstock.engine.platforms.select import platform_for
from penstock.engine.quantization.select import quantization_of
from penstock.engine.runtime.executor import StepExecutor
from penstock.engine.runtime.forms import Forms, FormsConfig
from penstock.engine.runtime.runner import Runner
from penstock.engine.runtime.torch_runner import TorchRunner
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.structured.matchers import MaskService
from penstock.engine.transfer.jobs import Mover
from penstock.engine.transfer.open import Transfer, open_transfer
from penstock.protocol.instance import InstanceCard
from penstock.trace import NO_TRACE, Trace

log = logging.getLogger(__name__)

#: What this engine can do, as instance cards say it.
CAPABILITIES = ("prefill", "decode", "logprobs", "prompt_logprobs", "structured", "prefix_cache")

#: Services bound their own queues; this bound only protects an instance from all of them together.
MAX_WAITING = 8192


@dataclass(frozen=True, slots=True)
class Engine:
    core: InstanceCore
    runner: Runner
    mover: Mover
    #: Processors that compute threads have been bound to.
    cpus: tuple[int, ...] = ()


def build_engine(
    config: EngineConfig,
    *,
    name: str = "engine-0",
    incarnation: int = 1,
    core_config: CoreConfig | None = None,
    progress: Callable[[float], None] | None = None,
    trace: Trace = NO_TRACE,
    address: str | None = None,
    registry: str | None = None,
    weights_fd: int | None = None,
) -> Engine:
    """Load the model and everything around it. Raises `StartupError`s with one-line reasons.

    `address` is where the instance will listen; without one it has no peers to move blocks to.
    `weights_fd` is a memfd for weights that it shares (`loading/shared_weights.py`).
    """
    runner = TorchRunner()
    place = _Place(name, incarnation, address, registry, weights_fd)
    try:
        parts = runner.call(lambda: _assemble(config, place, core_config, progress, trace))
    except BaseException:
        runner.close()
        raise
    runner.serve(parts.executor, parts.premapper)
    return Engine(parts.core, runner, parts.mover, parts.cpus)


@dataclass(frozen=True, slots=True)
class _Place:
    """Who the instance is, and where it is found."""

    name: str
    incarnation: int
    address: str | None
    registry: str | None
    #: What its starter has passed on to it.
    weights_fd: int | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A checkpoint as it is in memory. `digest`: see `model_digest`."""

    checkpoint: Checkpoint
    model: Model
    config: ModelConfig
    digest: str
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Parts:
    executor: StepExecutor
    premapper: Premapper | NoPremapper
    core: InstanceCore
    mover: Mover
    cpus: tuple[int, ...]


def _assemble(
    config: EngineConfig,
    place: _Place,
    core_config: CoreConfig | None,
    progress: Callable[[float], None] | None,
    trace: Trace,
) -> _Parts:
    platform = platform_for(config.device)
    config = config.for_device("cuda" if platform.device.type == "cuda" else "cpu")
    threads = placement.here(config.cpu_bind, config.num_threads)
    torch.set_num_threads(threads.num_threads)
    loaded = _load(config, platform, progress, place.weights_fd)
    with contextlib.ExitStack() as on_failure:  # the process may try again
        memory = _open_memory(config, platform, loaded.config)
        on_failure.callback(memory.close)
        attention = build_attention(
            loaded.config,
            lambda shape: platform.attention(
                shape, memory, loaded.model.dtype, config.attention_backend
            ),
        )
        executor = _executor(config, platform, loaded, memory, attention, trace)
        transfer = open_transfer(
            config,
            memory,
            loaded.digest,
            name=place.name,
            incarnation=place.incarnation,
            address=place.address,
            registry=place.registry,
        )
        on_failure.callback(transfer.mover.close)
        scheduler = _scheduler(config, loaded.config, memory.num_blocks, transfer)
        transfer.mover.offer(scheduler.pool.key_of)
        in_use = platform.kernels() | {"attention": attention.name}
        card = _card(config, loaded, place, memory, transfer, in_use)
        core = InstanceCore(
            card,
            scheduler,
            core_config,
            means=transfer.mover.means,
            endpoints=transfer.mover.endpoints,
            tiers=transfer.tiers,
        )
        premapper: Premapper | NoPremapper = NoPremapper()
        if isinstance(memory, XTensorMemory):
            premapper = Premapper(memory, memory.layout.block_tokens, trace)
        on_failure.callback(premapper.close)
        placement.bind_team(kernels.load(), threads.cpus)
        log.info("compute threads: %d (%s)", threads.num_threads, threads.reason)
        on_failure.pop_all()
    return _Parts(executor, premapper, core, transfer.mover, threads.cpus)


def _load(
    config: EngineConfig,
    platform: Platform,
    progress: Callable[[float], None] | None,
    weights_fd: int | None,
) -> _Loaded:
    """The model, and its digest, which is computed beside."""
    checkpoint = resolve(config.model, revision=config.revision)
    with computed_beside(
        checkpoint,
        load_format=config.load_format,
        seed=config.seed,
        quantization=config.quantization,
    ) as digest:
        model, model_config = load_model(
            checkpoint,
            platform,
            config.dtype,
            config.max_model_len,
            load_format=config.load_format,
            quantization=config.quantization,
            seed=config.seed,
            progress=progress,
            share=None if weights_fd is None else Segment(weights_fd),
            digest=digest,
        )
        named = model_digest(digest(), model_config)
    return _Loaded(checkpoint, model, model_config, named, platform.device)


def _open_memory(config: EngineConfig, platform: Platform, model: ModelConfig) -> KvMemory:
    """Room for KV, as large as the configuration or the machine allows."""
    assert config.max_num_seqs is not None
    layout = model.kv_layout(config.kv_cache_dtype)
    num_blocks = choose_num_blocks(
        layout,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        sizing=kv_sizing(config),
        available_bytes=platform.available_bytes(),
    )
    make = ContiguousMemory if config.kv_memory == "plain" else platform.kv_memory
    return make(layout, num_blocks, config.max_num_seqs, blocks_for(model.max_model_len, layout))


def _executor(
    config: EngineConfig,
    platform: Platform,
    loaded: _Loaded,
    memory: KvMemory,
    attention: AttentionBackend,
    trace: Trace,
) -> StepExecutor:
    assert config.max_num_seqs is not None
    model, vocab_size, eos = loaded.model, loaded.config.vocab_size, loaded.config.eos_token_ids
    return StepExecutor(
        model,
        memory,
        attention,
        Sampler(config.max_num_seqs, vocab_size, eos, platform.device),
        MaskService.from_checkpoint(loaded.checkpoint, vocab_size, eos),
        max_num_seqs=config.max_num_seqs,
        max_model_len=loaded.config.max_model_len,
        device=platform.device,
        forms=Forms(model, attention, platform, FormsConfig(config.graph_mode)),
        trace=trace,
    )


def _scheduler(
    config: EngineConfig, model: ModelConfig, num_blocks: int, transfer: Transfer
) -> Scheduler:
    assert config.max_num_seqs is not None and config.max_num_batched_tokens is not None
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=model.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            eos_token_ids=model.eos_token_ids,
            max_waiting=MAX_WAITING,
        ),
        num_blocks,
        transfer.num_windows,
        transfer.generations,
        transfer.holders,
    )


def _card(
    config: EngineConfig,
    loaded: _Loaded,
    place: _Place,
    memory: KvMemory,
    transfer: Transfer,
    kernels_in_use: dict[str, str],
) -> InstanceCard:
    assert config.max_num_seqs is not None and config.max_num_batched_tokens is not None
    return InstanceCard(
        name=place.name,
        incarnation=place.incarnation,
        pid=os.getpid(),
        model=config.model,
        model_digest=loaded.digest,
        vocab_size=loaded.config.vocab_size,
        max_model_len=loaded.config.max_model_len,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.device),
        layout=memory.layout,
        num_blocks=memory.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        can=CAPABILITIES,
        quantization=quantization_of(loaded.checkpoint, config.quantization).name,
        kernels=kernels_in_use,
        endpoints=transfer.mover.endpoints,
        host=transfer.host,
    )


def kv_sizing(config: EngineConfig) -> KvSizing:
    """What the flags of a configuration for one device say about the KV pool."""
    if config.device == "cuda":
        # Weights are in already: what is left of the share is for KV.
        return KvSizing(
            config.kv_cache_bytes,
            config.num_blocks,
            share=config.gpu_memory_utilization,
            default_cap_bytes=sys.maxsize,
        )
    default = KvSizing()
    return KvSizing(
        config.kv_cache_bytes,
        config.num_blocks,
        share=default.share * config.host_share,
        default_cap_bytes=int(default.default_cap_bytes * config.host_share),
    )
