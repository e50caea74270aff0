"""Prompts for the requests of a trace: as long, and sharing what they shared.

Requests with `hash_ids` begin with the blocks that these stand for; what is left of the last one,
and whole prompts without ids, are each request's own.
"""

from __future__ import annotations

from penstock.loadgen.traces import TraceRequest

#: Ids are below this, so that any real tokenizer has them.
NUM_IDS = 1000
#: A block of its own and a prompt of its own never look alike: the place after their digits.
_FILLER, _OWN = 1, 2
_DIGITS = 4


def prompt_ids(request: TraceRequest, number: int, *, num_ids: int = NUM_IDS) -> list[int]:
    """Token ids of the prompt of request `number` of its trace, all below `num_ids` (for models
    with a smaller vocabulary; at least 8)."""
    ids: list[int] = []
    for hash_id in request.hash_ids:
        ids += _block(hash_id, request.block_tokens, num_ids)
    missing = request.input_tokens - len(ids)
    if missing > 0:
        ids += _own(missing, number, num_ids)
    del ids[request.input_tokens :]
    return ids


def _block(hash_id: int, num_tokens: int, num_ids: int) -> list[int]:
    return [*_digits(hash_id, num_ids), *[_FILLER] * (num_tokens - _DIGITS)]


def _own(num_tokens: int, number: int, num_ids: int) -> list[int]:
    filler = [_FILLER] * max(num_tokens - _DIGITS - 1, 0)
    return [*_digits(number, num_ids), _OWN, *filler][:num_tokens]


def _digits(number: int, num_ids: int) -> list[int]:
    """In base `num_ids - 3`, above the fillers."""
    base = num_ids - 3
    return [3 + number // base**place % base for place in range(_DIGITS)]
