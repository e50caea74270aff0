"""Where the tensors lie that a model keeps: its own memory, or a segment that processes share.

Models and platforms say what they keep and how it is filled. Who answers may fill it (`Private`),
fill it where others will find it, or know that it is there already and fill nothing
(`loading/shared_weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.engine.memory.huge_pages import empty_huge

Fill = Callable[[torch.Tensor], object]


class Keeper:
    """In the order in which a model is built, which is the same each time."""

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        """A tensor that will not change once `fill` has written it."""
        out = empty_huge(shape, dtype)
        fill(out)
        return out

    def note(self, decide: Callable[[], str]) -> str:
        """Something about the weights that can only be decided by reading them."""
        return decide()

    def leaves_out(self, what: str) -> None:
        """Said before a weight is held in a form that nobody can share."""


PRIVATE = Keeper()
