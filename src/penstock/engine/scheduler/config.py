"""What the scheduler may spend."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.protocol.errors import ConfigError
from penstock.protocol.kv import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Names follow vLLM where the meaning is the same.

    `max_chunk_tokens` bounds the prompt tokens of one sequence in one step (vLLM's
    long_prefill_token_threshold); None: the token budget alone bounds them. `max_waiting` bounds
    the queue over both classes; a full queue refuses.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    block_tokens: int = BLOCK_TOKENS
    max_chunk_tokens: int | None = None
    max_waiting: int = 1024
    enable_prefix_caching: bool = True
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_tokens",
            "max_chunk_tokens", "max_waiting",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}", param=name)
