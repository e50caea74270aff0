"""Us. Batches go through `LLM.generate`; a single prompt is read as a stream, to see its first
token, from the same driver that `generate` reads."""

from __future__ import annotations

import time
from typing import Any

from worker import Generated, NotAvailable

import penstock
from penstock import LLM, SamplingParams
from penstock.protocol.errors import from_info


class PenstockEngine:
    def __init__(self, settings: dict[str, Any]) -> None:
        wanted = {}
        if settings["scheme"] is not None:
            wanted["quantization"], *int8_kv = settings["scheme"].split("+")
            if int8_kv:
                wanted["kv_cache_dtype"] = "int8"
        try:
            self._llm = LLM(
                settings["model"],
                dtype="bfloat16",
                device="cpu",
                max_model_len=settings["max_model_len"],
                kv_cache_memory_bytes=settings["kv_bytes"],
                num_threads=settings["num_threads"],
                enable_prefix_caching=True,
                **wanted,
            )
        except TypeError as exc:
            if not wanted:
                raise
            raise NotAvailable(f"this version has no quantization ({exc})") from exc
        self.version = penstock.__version__
        self.weight_bytes: int | None = None

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> Generated:
        params = [
            SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in max_tokens
        ]
        if len(prompts) == 1:
            return self._llm._on_loop(self._stream(prompts[0], params[0]))
        done = self._llm.generate(prompts, params, use_tqdm=False)
        return Generated(None, [output.outputs[0].token_ids for output in done])

    async def _stream(self, prompt: list[int], params: SamplingParams) -> Generated:
        stream = self._llm._driver.submit(self._llm._job(prompt, params).spec)
        made = Generated(None, [[]])
        while deltas := await stream.next():
            if made.first_token_at_s is None:
                made.first_token_at_s = time.perf_counter()
            for delta in deltas:
                if delta.error is not None:
                    raise from_info(delta.error)
                made.ids[0] += delta.ids
        return made


load = PenstockEngine
