"""Sets of instances as integers: one bit for each, in a column that it keeps while it is known.

A column that is given up may still have bits anywhere. It is not given to another instance before
they have been swept out; until then nobody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import and_

import numpy as np
import numpy.typing as npt

#: Up to so many bits are picked out one by one.
_FEW = 8
#: Masks looked at together in the middle of a prompt: bits only ever go out, and mostly at once.
_STRIDE = 64


class Columns:
    """`reserved`: bits that mean something else."""

    def __init__(self, reserved: int = 0) -> None:
        self._reserved = reserved
        #: Columns in use, and those that have been given up.
        self.live = 0
        self.dead = 0

    @property
    def width(self) -> int:
        return self._taken.bit_length()

    @property
    def _taken(self) -> int:
        return self.live | self.dead | self._reserved

    def take(self) -> int:
        """The bit of the first column that nobody has or had."""
        bit = ~self._taken & (self._taken + 1)
        self.live |= bit
        return bit

    def give_up(self, bit: int) -> None:
        self.live &= ~bit
        self.dead |= bit

    def swept(self, bits: int) -> None:
        self.dead &= ~bits


def leading(masks: Sequence[int], among: int, width: int) -> tuple[npt.NDArray[np.float64], int]:
    """By column: how many of `masks` have its bit before the first one that has not, with a last 0
    that stands for no column; and how many masks have any bit of all before. Shape (width + 1,)."""
    counts = np.zeros(width + 1)
    still, length = among, 0
    while still and length < len(masks):
        some = masks[length : length + _STRIDE]
        if length and still & reduce(and_, some) == still:
            length += len(some)  # nobody's chain ends here
            continue
        for mask in some:
            now = still & mask
            if now != still:
                if length:
                    _set(counts, still ^ now, length)
                still = now
                if not now:
                    return counts, length
            length += 1
    if still and length:
        _set(counts, still, length)
    return counts, length


def _set(counts: npt.NDArray[np.float64], bits: int, value: int) -> None:
    if bits.bit_count() > _FEW:
        packed = np.frombuffer(bits.to_bytes(-(-bits.bit_length() // 8), "little"), np.uint8)
        found = np.unpackbits(packed, bitorder="little", count=bits.bit_length())
        counts[: len(found)][found.astype(np.bool_)] = value
        return
    while bits:
        counts[bits.bit_length() - 1] = value
        bits ^= 1 << bits.bit_length() - 1
