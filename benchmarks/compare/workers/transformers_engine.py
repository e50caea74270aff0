"""transformers' `generate`: static batches, padded on the left; no prefix cache."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from worker import Generated


class _FirstToken:
    """A streamer: `generate` hands it the prompt, then each token."""

    def __init__(self) -> None:
        self.at_s: float | None = None
        self._calls = 0

    def put(self, _: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:
            self.at_s = time.perf_counter()

    def end(self) -> None: ...


class TransformersEngine:
    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["num_threads"])
        self._model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None
        self.version = transformers.__version__
        self.weight_bytes: int | None = None

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> Generated:
        longest = max(map(len, prompts))
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, longest - len(prompt) :] = 1
        streamer = _FirstToken() if len(prompts) == 1 else None
        done_BT = self._model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max(max_tokens),
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )
        made = [row[longest:][:n].tolist() for row, n in zip(done_BT, max_tokens, strict=True)]
        return Generated(streamer.at_s if streamer else None, made)


load = TransformersEngine
