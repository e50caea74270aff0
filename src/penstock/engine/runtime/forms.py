"""The form in which a step's forward pass runs, chosen for each batch.

* **captured**: the model's operations, written down once, replayed by one call. The number of
  tokens is a parameter, so one program serves all small batches, where starting some hundred
  operations from Python would cost as much as a tenth of the step.
* **piecewise**: the same with attention left out and called from Python, for backends that cannot
  be written down.
* **eager**: Python calls each operation; for batches so large that it does not matter, and where
  nothing else is possible.

Capturing is lazy: the first batch that could use a program runs eagerly, the second one captures
it. This is the xLLM report's adaptive graph mode, with the host's own programs for graphs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from penstock.engine.attention.base import AttentionBackend, AttentionRow, AttentionShape
from penstock.engine.config import GraphMode
from penstock.engine.models.base import Model
from penstock.engine.platforms.base import CannotCapture, Forward, Platform

log = logging.getLogger(__name__)

Form = Literal["captured", "piecewise", "eager"]


@dataclass(frozen=True, slots=True)
class FormsConfig:
    """`mode` "piecewise" and "eager" forbid what comes before them. Beyond `max_tokens` a step
    takes so long that its form makes no difference: at 256 tokens of a 0.6B model, 1 %."""

    mode: GraphMode = "auto"
    max_tokens: int = 256


class Forms:
    """`forward` like a model's, over an attention that has been planned.

    The result of a captured form is overwritten by the next call.
    """

    def __init__(
        self, model: Model, attention: AttentionBackend, platform: Platform, config: FormsConfig
    ) -> None:
        self._model = model
        self._attention = attention
        self._platform = platform
        self._config = config
        self._captured: Forward | None = None
        self._asked = False
        #: The best form found so far, and why it is not a better one.
        self.best: Form = "eager"
        self.reason: str | None = None
        #: Of the last call.
        self.last: Form = "eager"

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Final hidden states [T, E]; int64 ids and positions."""
        if len(ids_T) <= self._config.max_tokens:
            if self._captured is None and self._asked and self.reason is None:
                self._capture()
            self._asked = True
            if self._captured is not None:
                self.last = self.best
                return self._captured(ids_T, positions_T)
        self.last = "eager"
        return self._model.forward(ids_T, positions_T, self._attention)

    def _capture(self) -> None:
        """Sets `_captured`, or `reason`."""
        if self._config.mode == "eager":
            self.reason = "asked for"
            return
        attentions: dict[Form, AttentionBackend] = {
            "captured": self._attention,
            "piecewise": _CutAttention(self._attention, self._platform),
        }
        if self._config.mode == "piecewise":
            del attentions["captured"]
        for form, attention in attentions.items():
            try:
                self._captured = self._platform.capture(
                    partial(self._forward_through, attention), self._config.max_tokens
                )
                self.best = form
                log.info("steps of up to %d tokens are %s", self._config.max_tokens, form)
                return
            except CannotCapture as exc:
                self.reason = str(exc)
            except Exception as exc:  # eager is always right; the next step need not fail as well
                log.exception("capturing failed")
                self.reason = f"{type(exc).__name__}: {exc}"
        log.info("steps run eagerly: %s", self.reason)

    def _forward_through(
        self, attention: AttentionBackend, ids_T: torch.Tensor, positions_T: torch.Tensor
    ) -> torch.Tensor:
        return self._model.forward(ids_T, positions_T, attention)


class _CutAttention:
    """Leaves attention out of a program: it is called from Python between two pieces of it, and
    its result stands where the queries stood."""

    def __init__(self, backend: AttentionBackend, platform: Platform) -> None:
        self.name = backend.name
        self._backend = backend
        self._platform = platform

    @staticmethod
    def unsupported(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
        """The backend behind it has been asked."""
        return None

    def plan(self, rows: list[AttentionRow]) -> None:
        self._backend.plan(rows)

    def run(
        self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        def piece(num_tokens: int) -> None:
            rows = slice(0, num_tokens)
            q_THD[rows] = self._backend.run(layer, q_THD[rows], k_TGD[rows], v_TGD[rows])

        self._platform.cut(piece)
        return q_THD
