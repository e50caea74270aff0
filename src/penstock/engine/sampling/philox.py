"""Philox4x32-10, the counter-based generator every draw comes from.

The algorithm is from Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3"
(SC 2011). A counter-based generator has no state to lose: the same (key, counter) gives the same
128 bits on any machine, in any order, after any interruption.

The key is the sequence's seed (64 bits). The counter is (position, choice, purpose, 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for. Streams of different purposes at one position are independent."""

    SAMPLE = 0
    DRAFT = 1  # reserved: a draft model's proposal
    ACCEPT = 2  # reserved: the accept/reject coin of speculative decoding
    RECOVER = 3  # reserved: the draw from the residual distribution after a rejection


def philox4x32(
    counter: Sequence[ArrayLike], key: Sequence[ArrayLike]
) -> tuple[NDArray[np.uint64], ...]:
    """Four 32-bit words (held in uint64 arrays) for each counter of four words, key of two.

    The words of `counter` and `key` are scalars or arrays that broadcast against each other.
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for _ in range(_ROUNDS):
        # 32 x 32 bits fit a uint64 product, so nothing overflows.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def uniforms(
    seeds: ArrayLike, choices: ArrayLike, positions: ArrayLike, purpose: Purpose = Purpose.SAMPLE
) -> NDArray[np.float64]:
    """One float64 in [0, 1) with 53 random bits for each (seed, choice, position).

    `seeds` are uint64 (a negative seed is taken modulo 2**64 by the caller); `choices` and
    `positions` are below 2**32. `positions` are indices among the sequence's output tokens.
    """
    seed = np.asarray(seeds, dtype=np.uint64)
    words = philox4x32(
        (positions, choices, np.uint64(purpose), np.uint64(0)), (seed & _LOW, seed >> _SHIFT)
    )
    high = words[0] >> np.uint64(5)
    low = words[1] >> np.uint64(6)
    return (high * np.uint64(1 << 26) + low).astype(np.float64) * 2.0**-53
