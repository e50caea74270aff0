"""One engine under measurement: JSON jobs on standard input, JSON times on standard output.

Run by `benchmarks.against_vllm`, for us and, with another Python, for vLLM: both have the same
offline API, so one file serves both and neither gets an advantage. No import of ours but `LLM`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time


def private_bytes() -> int:
    """Resident memory without what is shared: our KV pool is a memfd, and counted apart."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 (vLLM's Python, too)
        kib = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}
    return 1024 * (int(kib["RssAnon"]) + int(kib["RssFile"]))


def main() -> None:
    engine, model, max_len, kv_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between our lines
    started_s = time.perf_counter()
    if engine == "vllm":
        from vllm import LLM, SamplingParams

        llm = LLM(
            model, dtype="bfloat16", max_model_len=max_len, skip_tokenizer_init=True,
            enable_prefix_caching=False, enforce_eager="--eager" in sys.argv,
        )  # fmt: skip

        def generate(prompts: list[list[int]], max_tokens: int) -> int:
            params = SamplingParams(
                max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False
            )
            wanted = [{"prompt_token_ids": p} for p in prompts]
            done = llm.generate(wanted, params, use_tqdm=False)
            return sum(len(o.outputs[0].token_ids) for o in done)
    else:
        from penstock import LLM, SamplingParams

        llm = LLM(
            model, dtype="bfloat16", max_model_len=max_len, enable_prefix_caching=False,
            device="cpu", kv_cache_memory_bytes=kv_bytes, load_format="auto",
        )  # fmt: skip

        def generate(prompts: list[list[int]], max_tokens: int) -> int:
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            done = llm.generate(prompts, params, use_tqdm=False)
            return sum(len(o.outputs[0].token_ids) for o in done)

    load_s = time.perf_counter() - started_s
    generate([[1, 2, 3]], 4)
    print(json.dumps({"load_s": load_s}), file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        started_s = time.perf_counter()
        num_tokens = generate(job["prompts"], job["max_tokens"])
        elapsed_s = time.perf_counter() - started_s
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        reply = {
            "elapsed_s": elapsed_s,
            "num_tokens": num_tokens,
            "peak_bytes": peak_bytes,
            "private_bytes": private_bytes(),
        }
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
