"""Prompts for the requests of a trace: as long, and sharing what they shared.

Requests with `hash_ids` begin with the blocks that these stand for; what is left of the last one,
and whole prompts without ids, are each request's own.
"""

from __future__ import annotations

from penstock.loadgen.traces import HASH_BLOCK_TOKENS, TraceRequest

#: Ids are below this, so that any real tokenizer has them.
NUM_IDS = 1000
_FILLER = [1] * (1 << 20)


def prompt_ids(request: TraceRequest, number: int) -> list[int]:
    """Token ids of the prompt of request `number` of its trace."""
    ids: list[int] = []
    for hash_id in request.hash_ids:
        ids += _block(hash_id)
    if request.hash_ids:
        del ids[request.input_tokens :]
        return ids
    return _own(request.input_tokens, number)


def _block(hash_id: int) -> list[int]:
    return [*_digits(hash_id), *_FILLER[: HASH_BLOCK_TOKENS - 4]]


def _own(num_tokens: int, number: int) -> list[int]:
    ids = [*_digits(number), 2, *_FILLER[: max(num_tokens - 5, 0)]]
    return ids[:num_tokens]


def _digits(number: int) -> list[int]:
    return [number // NUM_IDS**place % NUM_IDS for place in range(4)]
