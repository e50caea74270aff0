"""OpenVINO GenAI's continuous batching pipeline, stepped by hand so that first tokens are seen."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
from worker import Generated


class OpenVinoEngine:
    def __init__(self, settings: dict[str, Any]) -> None:
        scheduler = ov_genai.SchedulerConfig()
        scheduler.num_kv_blocks = 0
        scheduler.cache_size = max(1, settings["kv_bytes"] >> 30)
        scheduler.enable_prefix_caching = True
        # Its default of 256 makes four steps of a prompt of 1024 tokens: we, vLLM and llama.cpp
        # take 2048 at once.
        scheduler.max_num_batched_tokens = 2048
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            "INFERENCE_NUM_THREADS": settings["num_threads"],
        }
        self._pipeline = ov_genai.ContinuousBatchingPipeline(
            settings["weights"], scheduler, "CPU", properties
        )
        self._numbers = itertools.count()
        self.version = ov_genai.__version__
        self.weight_bytes: int | None = None

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> Generated:
        handles = []
        for prompt, n in zip(prompts, max_tokens, strict=True):
            config = ov_genai.GenerationConfig(max_new_tokens=n, ignore_eos=True, do_sample=False)
            ids = ov.Tensor(np.asarray([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(next(self._numbers), ids, config))
        made = Generated(None, [[] for _ in prompts])
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for place, handle in enumerate(handles):
                while handle.can_read():
                    if made.first_token_at_s is None:
                        made.first_token_at_s = time.perf_counter()
                    for output in handle.read().values():
                        made.ids[place] += output.generated_ids
        return made


load = OpenVinoEngine
