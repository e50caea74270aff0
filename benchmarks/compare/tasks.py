"""What is run offline. All prompts are random and new in each round: caches of prefixes help only
where a task shares them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.compare.traces import SHAREGPT, random_prompt, read_lengths

#: Output tokens from which the time per token of one stream is taken.
DECODED_TOKENS = 32
#: ShareGPT's lengths divided by this: at full length one batch would take a small CPU minutes.
SHAREGPT_DIVISOR = 8


@dataclass(frozen=True)
class Job:
    prompts: list[list[int]]
    max_tokens: list[int]


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    make: Callable[[random.Random, int], Job]
    #: The prompt's tokens of a single stream; None for a batch, where throughput counts.
    context_tokens: int | None = None

    def job(self, repeat: int, vocab_size: int) -> Job:
        return self.make(random.Random(f"{self.name}/{repeat}"), vocab_size)


def _context(num_tokens: int) -> Task:
    def make(draw: random.Random, vocab_size: int) -> Job:
        prompt = random_prompt(draw, num_tokens, vocab_size)
        return Job([prompt], [DECODED_TOKENS + 1])

    return Task(f"context_{num_tokens}", f"one stream, {num_tokens} tokens", make, num_tokens)


def _batch(num_prompts: int, prompt_tokens: int, output_tokens: int) -> Task:
    def make(draw: random.Random, vocab_size: int) -> Job:
        prompts = [random_prompt(draw, prompt_tokens, vocab_size) for _ in range(num_prompts)]
        return Job(prompts, [output_tokens] * num_prompts)

    return Task("batch", f"{num_prompts} × ({prompt_tokens} + {output_tokens})", make)


def _mixed(num_prompts: int) -> Task:
    def make(draw: random.Random, vocab_size: int) -> Job:
        lengths = [x.scaled(SHAREGPT_DIVISOR) for x in read_lengths(SHAREGPT)[:num_prompts]]
        prompts = [random_prompt(draw, x.input_tokens, vocab_size) for x in lengths]
        return Job(prompts, [x.output_tokens for x in lengths])

    return Task("mixed", f"{num_prompts} of ShareGPT's lengths / {SHAREGPT_DIVISOR}", make)


def _prefix(num_prompts: int, prompt_tokens: int, share: float, output_tokens: int) -> Task:
    def make(draw: random.Random, vocab_size: int) -> Job:
        shared = random_prompt(draw, round(prompt_tokens * share), vocab_size)
        own_tokens = prompt_tokens - len(shared)
        prompts = [shared + random_prompt(draw, own_tokens, vocab_size) for _ in range(num_prompts)]
        return Job(prompts, [output_tokens] * num_prompts)

    title = f"{num_prompts} × ({prompt_tokens} + {output_tokens}), {share:.0%} shared"
    return Task("prefix", title, make)


_ALL = (
    *(_context(n) for n in (128, 1024, 4096)),
    _batch(16, 256, 64),
    _mixed(16),
    _prefix(16, 512, 0.7, 16),
)
TASKS = {task.name: task for task in _ALL}
#: Longest prompt and output together, with room to spare.
MAX_MODEL_LEN = 4608
#: KV that the largest task holds at once, and llama.cpp's cache: 16 × (512 + 16) and some.
KV_TOKENS = 9216


def warm_up_jobs(vocab_size: int) -> list[Job]:
    """Before anything is measured: each engine sees a prompt, single steps and a batch. Short ones:
    some take a second for a hundred tokens."""
    draw = random.Random("warm-up")
    prompts = [random_prompt(draw, 16, vocab_size) for _ in range(16)]
    return [
        Job([random_prompt(draw, 128, vocab_size)], [4]),
        Job(prompts, [4] * len(prompts)),
    ]


def same_model_job(vocab_size: int) -> Job:
    """Greedy continuations to compare between engines: do they run the same model?"""
    draw = random.Random("same model")
    return Job([random_prompt(draw, 24, vocab_size) for _ in range(8)], [4] * 8)
