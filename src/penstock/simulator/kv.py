"""What the KV of a simulated instance contains, so that reading the wrong KV shows.

A cell stands for the KV of one position: a hash of all tokens up to there, which is what real KV is
a function of. A row of a batch compares every cell it reads with what it should be; if one differs,
everything the row writes and draws differs as well, from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

#: What stands in a block while a job fills it, and in one whose copy was spoilt.
GARBAGE = -7


@dataclass(slots=True)
class Page:
    """Block `block` of another instance's memory, as it was at `generation`."""

    memory: KvMemory
    block: int
    generation: int

    @property
    def moved_on(self) -> bool:
        return int(self.memory.generations[self.block]) != self.generation


@dataclass(slots=True, eq=False)
class KvMemory:
    """The blocks of one instance, and the windows on pages of others. Like a file without a name
    it outlives its process for whoever has mapped it."""

    num_blocks: int
    block_tokens: int
    generations: npt.NDArray[np.uint64] = field(init=False)
    windows: dict[int, Page] = field(default_factory=dict)
    #: Until when its host is busy sending copies of it.
    sends_until_s: float = 0.0
    _cells: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generations = np.zeros(self.num_blocks, np.uint64)

    def read(self, block: int) -> list[int]:
        """The cells of a block, or of the page that a window stands for."""
        page = self.windows.get(block)
        if page is not None:
            return page.memory.read(page.block)
        assert block < self.num_blocks, f"window {block} is not open"
        return self._cells.setdefault(block, [GARBAGE] * self.block_tokens)

    def write(self, block: int, offset: int, cell: int) -> None:
        assert block < self.num_blocks, "a window is read only"
        self.read(block)[offset] = cell

    def fill(self, block: int, cells: list[int]) -> None:
        assert block < self.num_blocks, "a window is read only"
        self._cells[block] = list(cells)

    def spoil(self, block: int) -> None:
        self.fill(block, [GARBAGE] * self.block_tokens)

    def stale_among(self, blocks: list[int]) -> list[int]:
        return [b for b in blocks if b in self.windows and self.windows[b].moved_on]


class NoCells(KvMemory):
    """Of runners that look at no block: generations and windows only."""

    def read(self, block: int) -> list[int]:
        return []

    def fill(self, block: int, cells: list[int]) -> None:
        pass


def prefix_hash(before: int, token_id: int) -> int:
    """Hashes of tuples of ints do not vary from run to run."""
    return hash((before, token_id))
