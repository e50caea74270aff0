"""From a configuration to a core and a runner: the one place where an engine is put together."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from penstock.checkpoint import resolve
from penstock.engine.config import EngineConfig
from penstock.engine.core import CoreConfig, InstanceCore
from penstock.engine.layers.attention import build_attention
from penstock.engine.loading.digest import model_digest
from penstock.engine.loading.loader import load_model
from penstock.engine.memory.base import KvMemory
from penstock.engine.memory.contiguous import ContiguousMemory
from penstock.engine.memory.premap import NoPremapper, Premapper
from penstock.engine.memory.sizing import KvSizing, blocks_for, choose_num_blocks
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.models.config import ModelConfig
from penstock.engine.platforms.cpu import kernels, placement
from penstock.engine.platforms.select import platform_for
from penstock.engine.runtime.executor import StepExecutor
from penstock.engine.runtime.forms import Forms, FormsConfig
from penstock.engine.runtime.torch_runner import TorchRunner
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.config import SchedulerConfig
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.structured.matchers import MaskService
from penstock.engine.transfer.jobs import Mover
from penstock.engine.transfer.open import open_transfer
from penstock.protocol.instance import InstanceCard
from penstock.protocol.kv import KvLayout
from penstock.trace import NO_TRACE, Trace

log = logging.getLogger(__name__)

#: What this engine can do, as instance cards say it.
CAPABILITIES = ("prefill", "decode", "logprobs", "prompt_logprobs", "structured", "prefix_cache")

#: Services bound their own queues; this bound only protects an instance from all of them together.
MAX_WAITING = 8192


@dataclass(frozen=True, slots=True)
class Engine:
    core: InstanceCore
    runner: TorchRunner
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
) -> Engine:
    """Load the model and everything around it. Raises `StartupError`s with one-line reasons.

    `address` is where the instance will listen; without one it has no peers to move blocks to.
    """
    runner = TorchRunner()
    try:
        executor, premapper, core, mover, cpus = runner.call(
            lambda: _assemble(
                config, name, incarnation, core_config, progress, trace, (address, registry)
            )
        )
    except BaseException:
        runner.close()
        raise
    runner.serve(executor, premapper)
    return Engine(core, runner, mover, cpus)


def _assemble(
    config: EngineConfig,
    name: str,
    incarnation: int,
    core_config: CoreConfig | None,
    progress: Callable[[float], None] | None,
    trace: Trace,
    place: tuple[str | None, str | None],
) -> tuple[StepExecutor, Premapper | NoPremapper, InstanceCore, Mover, tuple[int, ...]]:
    checkpoint = resolve(config.model, revision=config.revision)
    platform = platform_for(config.device)
    config = config.for_device("cuda" if platform.device.type == "cuda" else "cpu")
    assert config.max_num_seqs is not None and config.max_num_batched_tokens is not None
    threads = placement.here(config.cpu_bind, config.num_threads)
    torch.set_num_threads(threads.num_threads)
    model, model_config = load_model(
        checkpoint,
        platform,
        config.dtype,
        config.max_model_len,
        load_format=config.load_format,
        quantization=config.quantization,
        seed=config.seed,
        progress=progress,
    )
    max_model_len = model_config.max_model_len
    layout = model_config.kv_layout(config.kv_cache_dtype)
    num_blocks = choose_num_blocks(
        layout,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        sizing=kv_sizing(config),
        available_bytes=platform.available_bytes(),
    )
    make_memory = ContiguousMemory if config.kv_memory == "plain" else platform.kv_memory
    memory = make_memory(layout, num_blocks, config.max_num_seqs, blocks_for(max_model_len, layout))
    with _closed_on_failure(memory):
        attention = build_attention(
            model_config,
            lambda shape: platform.attention(shape, memory, model.dtype, config.attention_backend),
        )
        eos = model_config.eos_token_ids
        executor = StepExecutor(
            model,
            memory,
            attention,
            Sampler(config.max_num_seqs, model_config.vocab_size, eos, platform.device),
            MaskService.from_checkpoint(checkpoint, model_config.vocab_size, eos),
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            device=platform.device,
            forms=Forms(model, attention, platform, FormsConfig(config.graph_mode)),
            trace=trace,
        )
        digest = model_digest(
            checkpoint,
            load_format=config.load_format,
            seed=config.seed,
            quantization=config.quantization,
        )
        transfer = open_transfer(
            config,
            memory,
            digest,
            name=name,
            incarnation=incarnation,
            address=place[0],
            registry=place[1],
        )
        scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=max_model_len,
                enable_prefix_caching=config.enable_prefix_caching,
                eos_token_ids=eos,
                max_waiting=MAX_WAITING,
            ),
            num_blocks,
            transfer.num_windows,
            transfer.generations,
            transfer.holders,
        )
        card = _card(
            config,
            digest,
            model_config,
            name=name,
            incarnation=incarnation,
            layout=layout,
            num_blocks=num_blocks,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(platform.device),
            kernels=platform.kernels() | {"attention": attention.name},
            endpoints=transfer.mover.endpoints,
            host=transfer.host,
        )
        premapper: Premapper | NoPremapper = NoPremapper()
        if isinstance(memory, XTensorMemory):
            premapper = Premapper(memory, layout.block_tokens, trace)
        with _closed_on_failure(transfer.mover), _closed_on_failure(premapper):
            placement.bind_team(kernels.load(), threads.cpus)
        log.info("compute threads: %d (%s)", threads.num_threads, threads.reason)
        core = InstanceCore(
            card,
            scheduler,
            core_config,
            means=transfer.mover.means,
            endpoints=transfer.mover.endpoints,
            tiers=transfer.tiers,
        )
        return executor, premapper, core, transfer.mover, threads.cpus


@contextlib.contextmanager
def _closed_on_failure(opened: KvMemory | Premapper | NoPremapper | Mover) -> Iterator[None]:
    """A start that fails gives the pool back, and threads: the process may try again."""
    try:
        yield
    except BaseException:
        opened.close()
        raise


def _card(
    config: EngineConfig,
    digest: str,
    model_config: ModelConfig,
    *,
    name: str,
    incarnation: int,
    layout: KvLayout,
    num_blocks: int,
    dtype: str,
    device: str,
    kernels: dict[str, str],
    endpoints: dict[str, str],
    host: str,
) -> InstanceCard:
    assert config.max_num_seqs is not None and config.max_num_batched_tokens is not None
    return InstanceCard(
        name=name,
        incarnation=incarnation,
        pid=os.getpid(),
        model=config.model,
        model_digest=digest,
        vocab_size=model_config.vocab_size,
        max_model_len=model_config.max_model_len,
        dtype=dtype,
        device=device,
        layout=layout,
        num_blocks=num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        can=CAPABILITIES,
        kernels=kernels,
        endpoints=endpoints,
        host=host,
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
