"""How large the KV pool is: the layout of a block, what is free here, how many blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.protocol.errors import ConfigError, NotEnoughMemory
from penstock.protocol.kv import BLOCK_TOKENS, KvLayout

GIB = 1 << 30
PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
#: Beside each token's values of one kv head (see codec.py).
_SCALE_BYTES = {"int8": 4}


@dataclass(frozen=True, slots=True)
class KvSizing:
    """What the user may set; the defaults take a share of what is free now.

    `kv_cache_bytes` is a hard cap on the pool. `num_blocks` wins over it. Without either, the pool
    takes `share` of the available memory, but never more than `default_cap_bytes` nor more than
    all slots could fill.
    """

    kv_cache_bytes: int | None = None
    num_blocks: int | None = None
    share: float = 0.4
    default_cap_bytes: int = 4 * GIB


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a `KvLayout.dtype`."""
    return _DTYPES[name]


def kv_layout(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype | str,
    *,
    block_tokens: int = BLOCK_TOKENS,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> KvLayout:
    """The layout of one rank's blocks; `num_kv_heads` counts this rank's heads."""
    name = str(dtype).removeprefix("torch.")
    token_bytes = head_dim * torch_dtype(name).itemsize + _SCALE_BYTES.get(name, 0)
    return KvLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=name,
        block_bytes=num_layers * 2 * num_kv_heads * block_tokens * token_bytes,
        tp_rank=tp_rank,
        tp_size=tp_size,
    )


def block_shape(layout: KvLayout) -> tuple[int, int, int, int, int]:
    """[layer, k|v, kv_head, token, dim] of one block; of int8, `dim` has room for the scales."""
    dim = layout.head_dim + _SCALE_BYTES.get(layout.dtype, 0)
    return (layout.num_layers, 2, layout.num_kv_heads, layout.block_tokens, dim)


def block_stride_bytes(layout: KvLayout) -> int:
    """Block bytes rounded up to whole pages, since a page is what can be mapped."""
    return -(-layout.block_bytes // PAGE_BYTES) * PAGE_BYTES


def blocks_for(num_tokens: int, layout: KvLayout) -> int:
    return -(-num_tokens // layout.block_tokens)


def choose_num_blocks(
    layout: KvLayout,
    *,
    max_model_len: int,
    max_num_seqs: int,
    sizing: KvSizing | None = None,
    available_bytes: int | None = None,
) -> int:
    """Blocks in the pool. `available_bytes` defaults to what this machine has to spare now.

    Raises `ConfigError` when an explicit size is below one sequence of `max_model_len` tokens, and
    `NotEnoughMemory` when the machine cannot hold even that.
    """
    sizing = sizing or KvSizing()
    stride = block_stride_bytes(layout)
    one_sequence = blocks_for(max_model_len, layout)
    if sizing.num_blocks is not None:
        return _at_least(sizing.num_blocks, one_sequence, stride, max_model_len)
    if sizing.kv_cache_bytes is not None:
        return _at_least(sizing.kv_cache_bytes // stride, one_sequence, stride, max_model_len)
    if available_bytes is None:
        available_bytes = available_memory_bytes()
    budget_bytes = min(int(available_bytes * sizing.share), sizing.default_cap_bytes)
    num_blocks = min(budget_bytes // stride, one_sequence * max_num_seqs)
    if num_blocks >= one_sequence:
        return num_blocks
    if one_sequence * stride > available_bytes * 0.9:
        raise NotEnoughMemory(
            f"one sequence of {max_model_len} tokens needs {_gib(one_sequence * stride)} of KV "
            f"cache and {_gib(available_bytes)} are free: lower --max-model-len"
        )
    return one_sequence


def _at_least(num_blocks: int, one_sequence: int, stride: int, max_model_len: int) -> int:
    if num_blocks < one_sequence:
        raise ConfigError(
            f"the KV cache of {_gib(num_blocks * stride)} is smaller than one sequence of "
            f"{max_model_len} tokens ({_gib(one_sequence * stride)}): "
            "enlarge it or lower --max-model-len"
        )
    return num_blocks


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def available_memory_bytes(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> int:
    """What this process may still allocate: the machine's free memory or its control group's."""
    found = [_meminfo_available(proc)]
    found += _cgroup_headrooms(proc, sys)
    return max(0, min(found))


def _meminfo_available(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise NotEnoughMemory(f"{proc}/meminfo does not say what is available: set the KV size by flag")


def _cgroup_headrooms(proc: Path, sys: Path) -> list[int]:
    """limit - usage of every enclosing control group, versions 1 and 2; page cache is not usage."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = sys / "fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = (
                sys / "fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        # Inside a container the path is often not visible and the root itself carries the limit.
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            found += _headroom(folder, limit, usage)
            if folder == root:
                break
    return found


def _headroom(folder: Path, limit: str, usage: str) -> list[int]:
    try:
        limit_bytes = int((folder / limit).read_text())
        usage_bytes = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # absent, or "max"
        return []
    inactive_file_bytes = next(
        (int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0
    )
    return [limit_bytes - usage_bytes + inactive_file_bytes]
