"""The models and GPUs that cost models are made for: shapes that decide which kernels a step runs.

Shapes are those of the models' config.json on the hub; memory is what the makers state.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder. All have heads of `HEAD_DIM` and SwiGLU."""

    parameters: float
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def kv_bytes_per_token(self) -> int:
        """In bfloat16."""
        return self.num_layers * 2 * self.num_kv_heads * HEAD_DIM * 2

    def linears(self, tp: int) -> list[tuple[int, int]]:
        """(n, k) of the matrix products of one layer on one of `tp` ranks: QKV, O, gate and up,
        down."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * HEAD_DIM // tp
        return [
            (qkv, self.hidden),
            (self.hidden, self.num_heads * HEAD_DIM // tp),
            (2 * self.intermediate // tp, self.hidden),
            (self.hidden, self.intermediate // tp),
        ]


MODELS = {
    "llama3.1-8b": ModelShape(8.03e9, 32, 4096, 14336, 32, 8, 128256),
    "llama3.1-70b": ModelShape(70.6e9, 80, 8192, 28672, 64, 8, 128256),
    "qwen3-8b": ModelShape(8.19e9, 36, 4096, 12288, 32, 8, 151936),
    "qwen3-32b": ModelShape(32.8e9, 64, 5120, 25600, 64, 8, 151936),
}
MEMORY_BYTES = {"a100_sxm": 80e9, "h100_sxm": 80e9, "h200_sxm": 141e9}
DTYPE_BYTES = {"bfloat16": 2, "fp8": 1}
#: Of the memory, for weights and KV (vLLM's gpu_memory_utilization).
USED = 0.9
#: An instance with less room for KV than this serves nobody.
LEAST_KV_TOKENS = 16_384


def kv_tokens(gpu: str, model: str, gemm_dtype: str, tp: int) -> int:
    """KV that fits beside the weights, in tokens; less than 0 if not even those fit."""
    shape = MODELS[model]
    weight_bytes = shape.parameters * DTYPE_BYTES[gemm_dtype]
    return int((USED * MEMORY_BYTES[gpu] * tp - weight_bytes) / shape.kv_bytes_per_token)
