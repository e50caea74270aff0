"""llama.cpp by its C interface (llama-cpp-python's high-level API runs one sequence at a time).

All prompts are prefilled in batches of 2,048 tokens, then every live sequence gets a token a step.
A prefix that all prompts share is computed once and copied to the other sequences, as llama.cpp's
own `examples/parallel` does with a system prompt. KV is f16, llama.cpp's default.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from dataclasses import dataclass
from typing import Any

import llama_cpp as llama
import numpy as np
from worker import Generated

BATCH_TOKENS = 2048
MICROBATCH_TOKENS = 512
MAX_SEQUENCES = 16


@dataclass
class _Entry:
    token: int
    position: int
    sequence: int
    samples: bool


class LlamaEngine:
    def __init__(self, settings: dict[str, Any]) -> None:
        llama.llama_backend_init()
        model = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(settings["weights"].encode(), model)
        if not self._model:
            raise RuntimeError("llama.cpp does not load the GGUF file")
        context = llama.llama_context_default_params()
        context.n_ctx = settings["kv_tokens"]
        context.n_batch = BATCH_TOKENS
        context.n_ubatch = MICROBATCH_TOKENS
        context.n_seq_max = MAX_SEQUENCES
        context.n_threads = context.n_threads_batch = settings["num_threads"]
        context.kv_unified = True  # one sequence may be as long as the whole cache
        self._context = llama.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp does not make a context")
        self._memory = llama.llama_get_memory(self._context)
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.version = llama.__version__
        self.weight_bytes: int | None = None

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> Generated:
        made = Generated(None, [])
        for start in range(0, len(prompts), MAX_SEQUENCES):
            end = start + MAX_SEQUENCES
            part = self._generate(prompts[start:end], max_tokens[start:end])
            made.ids += part.ids
            made.first_token_at_s = made.first_token_at_s or part.first_token_at_s
        return made

    def _generate(self, prompts: list[list[int]], max_tokens: list[int]) -> Generated:
        llama.llama_memory_clear(self._memory, True)
        made = Generated(None, [[] for _ in prompts])
        shared = _shared_tokens(prompts)
        if shared:
            self._decode([_Entry(t, i, 0, False) for i, t in enumerate(prompts[0][:shared])])
            for sequence in range(1, len(prompts)):
                llama.llama_memory_seq_cp(self._memory, 0, sequence, 0, shared)
        entries = [
            _Entry(token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
            if position >= shared
        ]
        while entries:
            for sequence, token in self._decode(entries).items():
                made.first_token_at_s = made.first_token_at_s or time.perf_counter()
                made.ids[sequence].append(token)
            entries = [
                _Entry(ids[-1], len(prompts[s]) + len(ids) - 1, s, True)
                for s, ids in enumerate(made.ids)
                if len(ids) < max_tokens[s]
            ]
        return made

    def _decode(self, entries: list[_Entry]) -> dict[int, int]:
        """Compute these tokens; the greedy choice of each sequence that samples."""
        chosen: dict[int, int] = {}
        for start in range(0, len(entries), BATCH_TOKENS):
            part = entries[start : start + BATCH_TOKENS]
            batch = self._batch
            batch.n_tokens = len(part)
            for i, entry in enumerate(part):
                batch.token[i] = entry.token
                batch.pos[i] = entry.position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = entry.sequence
                batch.logits[i] = entry.samples
            if code := llama.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode gave {code}")
            for i, entry in enumerate(part):
                if entry.samples:
                    logits = llama.llama_get_logits_ith(self._context, i)
                    address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
                    values = np.ctypeslib.as_array(address, (self._vocab_size,))
                    chosen[entry.sequence] = int(values.argmax())
        return chosen


def _shared_tokens(prompts: list[list[int]]) -> int:
    """Length of the prefix that all of several prompts have; each keeps a token to compute."""
    if len(prompts) < 2:
        return 0
    columns = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in columns), min(map(len, prompts)) - 1)


load = LlamaEngine
