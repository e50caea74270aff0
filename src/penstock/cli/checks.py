"""What `penstock doctor` looks at. Each check yields findings; an error means: it cannot serve.

The checks call what serving itself calls (the same config reader, header check, sizing and choice
of kernels), so that their verdict is its verdict. Only tensors' headers are read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from penstock.checkpoint import Checkpoint, resolve
from penstock.cli import ports
from penstock.cli.machine import Machine, read_machine
from penstock.engine.config import EngineConfig
from penstock.protocol.errors import ConfigError, PenstockError
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.config import ServeConfig

Level = Literal["ok", "warning", "error"]
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    area: Literal["checkpoint", "machine", "plan"]
    level: Level
    text: str


@dataclass
class Examination:
    """What later checks need of earlier ones. `facts` is what --json shows beside the findings."""

    engine: EngineConfig
    serve: ServeConfig
    checkpoint: Checkpoint | None = None
    machine: Machine | None = None
    platform: Any = None
    model: Any = None  # the engine's ModelConfig
    quantization: Any = None  # the engine's Quantization
    weights_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Examination], Iterator[Finding]]


def examine(engine: EngineConfig, serve: ServeConfig) -> tuple[list[Finding], dict[str, Any]]:
    """All checks in order; one that fails does not keep the next from looking."""
    state = Examination(engine, serve)
    findings: list[Finding] = []
    for area, check in _CHECKS:
        try:
            findings += check(state)
        except PenstockError as exc:
            if not any(found.text == exc.message for found in findings):  # a cause has one finding
                findings.append(Finding(area, "error", exc.message))
    return findings, state.facts


def _folder(state: Examination) -> Iterator[Finding]:
    state.checkpoint = resolve(state.engine.model, revision=state.engine.revision)
    state.facts["path"] = str(state.checkpoint.path)
    yield Finding("checkpoint", "ok", f"{state.engine.model} is at {state.checkpoint.path}")


def _architecture(state: Examination) -> Iterator[Finding]:
    if state.checkpoint is None:
        return
    from penstock.engine.models.registry import model_config

    model = model_config(state.checkpoint, max_model_len=state.engine.max_model_len)
    state.model = model
    state.facts["config"] = dataclasses.asdict(model)
    yield Finding(
        "checkpoint",
        "ok",
        f"{model.family}: {model.num_layers} layers of {model.hidden_size}, {model.num_heads} "
        f"heads over {model.num_kv_heads} for keys and values, vocabulary {model.vocab_size}, "
        f"context {model.max_model_len}, {model.dtype}",
    )


def _quantization(state: Examination) -> Iterator[Finding]:
    if state.checkpoint is None:
        return
    from penstock.engine.quantization.select import quantization_of

    found = state.quantization = quantization_of(state.checkpoint, state.engine.quantization)
    state.facts["quantization"] = {
        "method": found.format.method,
        "stored": found.format.describe(),
        "in_memory": found.describe(),
    }
    if found.format.method != "none":
        text = f"quantized by {found.format.method}: {found.format.describe()}"
        yield Finding("checkpoint", "ok", text)
    for remark in found.format.remarks():
        yield Finding("checkpoint", "warning", remark)


def _texts(state: Examination) -> Iterator[Finding]:
    if state.checkpoint is None:
        return
    from penstock.service.text.texts import Texts

    texts = Texts.from_checkpoint(
        state.checkpoint,
        chat_template=state.serve.chat_template,
        tool_call_parser=state.serve.tool_call_parser,
        reasoning_parser=state.serve.reasoning_parser,
    )
    tokenizer = texts.tokenizer
    yield Finding("checkpoint", "ok", f"tokenizer of {tokenizer.vocab_size} tokens")
    if state.model is not None and tokenizer.vocab_size > state.model.vocab_size:
        yield Finding(
            "checkpoint",
            "error",
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{state.model.vocab_size}: they do not belong together",
        )
    if not (tokenizer.eos_token_ids or state.checkpoint.eos_token_ids):
        yield Finding(
            "checkpoint",
            "warning",
            "no end-of-sequence token is known: answers end at max_tokens only; name one as "
            "eos_token_id in generation_config.json",
        )
    yield from _template(texts)


def _template(texts: Any) -> Iterator[Finding]:
    from penstock.service.text.chat_template import NoChatTemplate

    if isinstance(texts.template, NoChatTemplate):
        yield Finding(
            "checkpoint",
            "warning",
            "no chat template: /v1/completions works, /v1/chat/completions needs --chat-template",
        )
        return
    prompt = texts.render_chat([{"role": "user", "content": "Hello"}])
    tokens = texts.tokenizer.encode(prompt, add_special_tokens=False)
    yield Finding("checkpoint", "ok", f"chat template: 'Hello' becomes {len(tokens)} tokens")


def _tensors(state: Examination) -> Iterator[Finding]:
    if state.checkpoint is None or state.model is None or state.quantization is None:
        return
    from penstock.engine.loading.loader import check_load_format, check_tensors, declare
    from penstock.engine.loading.tensors import CheckpointTensors

    check_load_format(state.checkpoint, state.engine.load_format)
    if state.engine.load_format == "dummy":
        return
    with CheckpointTensors(state.checkpoint) as tensors:
        declared = declare(state.model, None, state.quantization, tensors.find)
        check_tensors(tensors, declared, state.model, state.quantization)
        num_files = len(tensors.files)
        num_bytes = sum(tensors.info(name).num_bytes for name in declared.shapes)
    yield Finding(
        "checkpoint",
        "ok",
        f"{len(declared.shapes)} tensors in {num_files} file{'s' * (num_files > 1)}, "
        f"{_size(num_bytes)}: all there, all of the right shape",
    )


def _hardware(state: Examination) -> Iterator[Finding]:
    machine = state.machine = read_machine()
    state.facts["machine"] = dataclasses.asdict(machine)
    features = ", ".join(machine.features) or "none that matter here"
    yield Finding("machine", "ok", f"{machine.cpu}: {machine.cores} cores; {features}")
    from penstock.engine.platforms.cpu import placement

    threads = placement.here(state.engine.cpu_bind, state.engine.num_threads)
    state.facts["compute_threads"] = {"count": threads.num_threads, "cpus": threads.cpus}
    yield Finding("machine", "ok", f"compute threads: {threads.num_threads} ({threads.reason})")
    if machine.architecture == "x86_64" and "avx2" not in machine.features:
        yield Finding("machine", "warning", "this CPU has no AVX2: expect to wait")
    elif not {"avx512_bf16", "amx_bf16", "bf16"} & set(machine.features):
        yield Finding(
            "machine",
            "warning",
            "this CPU has no bfloat16 arithmetic: --dtype float32 may be faster, at twice the size",
        )
    yield Finding(
        "machine",
        "ok",
        f"memory: {_size(machine.memory_available_bytes)} of {_size(machine.memory_total_bytes)} "
        f"free; huge pages: {machine.transparent_hugepages}, for shared memory "
        f"{machine.shared_hugepages}",
    )


def _device(state: Examination) -> Iterator[Finding]:
    from penstock.engine.platforms.select import platform_for

    state.platform = platform_for(state.engine.device)
    device = state.platform.device
    state.facts["device"] = str(device)
    if device.type != "cuda":
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    yield Finding(
        "machine",
        "ok",
        f"{torch.cuda.get_device_name(device)}: {_size(free)} of {_size(total)} free",
    )


def _compiler(state: Examination) -> Iterator[Finding]:
    if state.platform is None or state.platform.device.type != "cpu":
        return
    from penstock.engine.platforms.cpu import kernels

    try:
        library = kernels.build()
    except kernels.CompileFailed as exc:
        yield Finding(
            "machine",
            "warning",
            f"kernels cannot be compiled ({exc}): torch's are used, which are slower; install g++",
        )
        return
    compiler = state.machine.compiler if state.machine else None
    yield Finding("machine", "ok", f"kernels compiled by {compiler}, kept in {library.parent}")


def _port(state: Examination) -> Iterator[Finding]:
    if state.serve.uds is None:
        ports.require_free(state.serve.host, state.serve.port)
        yield Finding("machine", "ok", f"port {state.serve.port} is free")


def _trace(state: Examination) -> Iterator[Finding]:
    if (path := state.engine.trace) is None:
        return
    new = not os.path.lexists(path)
    try:
        # Appending changes nothing of a file that is there; a pipe without a reader is refused.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644))
        if new:
            Path(path).unlink()
    except OSError as exc:
        raise ConfigError(f"--trace {path} cannot be written: {exc.strerror}") from exc
    yield Finding("plan", "ok", f"trace: {path}, to be opened at https://ui.perfetto.dev")


def _dtype_and_kernels(state: Examination) -> Iterator[Finding]:
    if state.model is None or state.platform is None:
        return
    from penstock.engine.attention import select
    from penstock.engine.attention.base import AttentionShape
    from penstock.engine.loading.loader import choose_dtype
    from penstock.engine.memory.sizing import torch_dtype

    name = choose_dtype(state.model, state.platform, state.engine.dtype)
    model = state.model = dataclasses.replace(state.model, dtype=name)
    shape = AttentionShape(
        model.num_heads, model.num_kv_heads, model.head_dim, model.attention_scale
    )
    dtype, device = torch_dtype(name), state.platform.device
    backend = select.choose(shape, dtype, device, state.engine.attention_backend)
    kernels = state.platform.kernels() | {"attention": backend.name}
    declared = _declared(state)
    state.weights_bytes = declared.num_bytes
    state.facts |= {"dtype": name, "kernels": kernels, "weights_bytes": state.weights_bytes}
    yield Finding("plan", "ok", f"{name} on {device}; weights take {_size(state.weights_bytes)}")
    yield from _few_bits(state, declared.counted.kernel_counts)
    listed = ", ".join(f"{operation}: {kernel}" for operation, kernel in sorted(kernels.items()))
    yield Finding("plan", "ok", f"kernels: {listed}")
    for other, reason in select.refusals(shape, dtype, device).items():
        if reason is not None:
            yield Finding("plan", "warning", f"attention {other} is not in use: {reason}")


def _declared(state: Examination) -> Any:
    """What the weights will be on this platform, with these flags."""
    from penstock.engine.loading.loader import declare
    from penstock.engine.loading.tensors import CheckpointTensors

    wanted = state.quantization
    if wanted is None or state.checkpoint is None or state.engine.load_format == "dummy":
        from penstock.engine.quantization.formats.base import PLAIN

        wanted = wanted and dataclasses.replace(wanted, format=PLAIN)
        return declare(state.model, state.platform, wanted)
    with CheckpointTensors(state.checkpoint) as tensors:
        return declare(state.model, state.platform, wanted, tensors.find)


def _few_bits(state: Examination, counts: Mapping[str, int]) -> Iterator[Finding]:
    """How many weights stay in few bits, and what runs them; and how many do not."""
    from penstock.engine.loading.declared import DEQUANTIZED

    state.facts["few_bits"] = dict(counts)
    for kernel, number in counts.items():
        if kernel != DEQUANTIZED:
            text = f"{number} weights stay in few bits ({state.quantization.describe()}): {kernel}"
            yield Finding("plan", "ok", text)
    if number := counts.get(DEQUANTIZED, 0):
        text = f"{number} weights are dequantized to {state.model.dtype}: no kernel here takes them"
        yield Finding("plan", "warning", text)
    elif (
        not counts and state.quantization is not None and state.quantization.format.method != "none"
    ):
        text = f"all weights are dequantized to {state.model.dtype} while loading"
        yield Finding("plan", "ok", text)


def _capacity(state: Examination) -> Iterator[Finding]:
    if state.model is None or state.platform is None or not state.weights_bytes:
        return
    from penstock.engine.build import kv_sizing
    from penstock.engine.memory.sizing import block_stride_bytes, choose_num_blocks

    model = state.model
    config = state.engine.for_device("cuda" if state.platform.device.type == "cuda" else "cpu")
    assert config.max_num_seqs is not None and config.max_num_batched_tokens is not None
    layout = model.kv_layout(state.engine.kv_cache_dtype)
    num_blocks = choose_num_blocks(
        layout,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        sizing=kv_sizing(config),
        available_bytes=max(0, state.platform.available_bytes() - state.weights_bytes),
    )
    num_bytes = num_blocks * block_stride_bytes(layout)
    num_tokens = num_blocks * BLOCK_TOKENS
    full = num_tokens // model.max_model_len
    state.facts |= {
        "kv_bytes": num_bytes,
        "kv_blocks": num_blocks,
        "kv_tokens": num_tokens,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": model.max_model_len,
        "full_length_sequences": full,
    }
    yield Finding(
        "plan",
        "ok",
        f"KV cache: {_size(num_bytes)} in {num_blocks} blocks, {num_tokens} tokens",
    )
    yield Finding(
        "plan",
        "ok",
        f"up to {config.max_num_seqs} sequences at once, {min(full, config.max_num_seqs)} of them "
        f"if each takes all {model.max_model_len} tokens; {config.max_num_batched_tokens} tokens "
        "a step",
    )


_CHECKS: tuple[tuple[Literal["checkpoint", "machine", "plan"], Check], ...] = (
    ("checkpoint", _folder),
    ("checkpoint", _architecture),
    ("checkpoint", _quantization),
    ("checkpoint", _texts),
    ("checkpoint", _tensors),
    ("machine", _hardware),
    ("machine", _device),
    ("machine", _compiler),
    ("machine", _port),
    ("plan", _dtype_and_kernels),
    ("plan", _capacity),
    ("plan", _trace),
)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
