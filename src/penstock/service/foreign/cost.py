"""What a server that says nothing of its speed costs: fitted from the times of its answers.

The coefficients are those of `protocol.CostModel` without the terms for attention, which cannot be
told apart from outside:

    seconds = base_s * steps + per_token_s * tokens + per_row_s * rows * steps

A first token that came after W prompt tokens (those queued before it included) took
ceil(W / step tokens) steps; each further token of a stream took one, with as many tokens as rows.
Recursive least squares with forgetting (Haykin, Adaptive Filter Theory, chapter 10) over three
coefficients; each observation is divided by its number of steps, so that all weigh alike.
"""

from __future__ import annotations

import math

from penstock.protocol.instance import CostModel

#: What engines take in one step unless they say otherwise; a guess that only shapes the fit.
STEP_TOKENS = 8192
_FORGET = 0.99
#: Features are of the size of one after this.
_SCALE = (1.0, 1e-3, 1e-1)
_START = (1e-3, 1e-4, 0.0)
_MOST_TRACE = 1e4
_SETTLED = 5

_Vector = tuple[float, float, float]


class CostFit:
    def __init__(self) -> None:
        self._weights: list[float] = [w / s for w, s in zip(_START, _SCALE)]
        self._cov = [[1.0 if i == j else 0.0 for j in range(3)] for i in range(3)]
        self._residual_s = 0.0
        self._num_observed = 0
        self._model: CostModel | None = None

    def first_token(self, work_tokens: float, rows: float, seconds: float) -> None:
        """It came `seconds` after its request, with `work_tokens` to compute until then (its own
        and those before it) while `rows` sequences ran."""
        steps = max(1.0, math.ceil(work_tokens / STEP_TOKENS))
        self._observe((1.0, work_tokens / steps, rows), seconds / steps)

    def further_tokens(self, count: int, rows: float, seconds: float) -> None:
        """A stream of `count` tokens after its first one, while `rows` ran, itself among them."""
        if count > 0:
            self._observe((1.0, rows, rows), seconds / count)

    def whole(self, work_tokens: float, count: int, rows: float, seconds: float) -> None:
        """An answer of `count` tokens that came in one piece."""
        steps = max(1.0, math.ceil(work_tokens / STEP_TOKENS))
        total = steps + max(0, count - 1)
        tokens = work_tokens + rows * max(0, count - 1)
        self._observe((1.0, tokens / total, rows), seconds / total)

    def model(self) -> CostModel:
        if self._model is None:
            base, token, row = (max(0.0, w * s) for w, s in zip(self._weights, _SCALE))
            self._model = CostModel(
                base_s=base,
                per_token_s=token,
                per_row_s=row,
                residual_s=self._residual_s,
                num_steps=self._num_observed,
            )
        return self._model

    def _observe(self, features: _Vector, seconds: float) -> None:
        x = [f * s for f, s in zip(features, _SCALE)]
        error = seconds - sum(w * v for w, v in zip(self._weights, x))
        if self._num_observed:
            limit_s = 5 * self._residual_s + 0.2 * abs(seconds - error)
            self._residual_s += 0.05 * (abs(error) - self._residual_s)
            if self._num_observed >= _SETTLED:  # one that was held up says little about the next
                error = min(max(error, -limit_s), limit_s)
        self._num_observed += 1
        self._model = None
        cov_x = [sum(c * v for c, v in zip(row, x)) for row in self._cov]
        denominator = _FORGET + sum(v * c for v, c in zip(x, cov_x))
        gain = [c / denominator for c in cov_x]
        self._weights = [w + g * error for w, g in zip(self._weights, gain)]
        self._cov = [
            [(c - g * cx) / _FORGET for c, cx in zip(row, cov_x)] for row, g in zip(self._cov, gain)
        ]
        # What is never excited would grow without bound as the rest is forgotten.
        trace = sum(self._cov[i][i] for i in range(3))
        if trace > _MOST_TRACE:
            shrink = _MOST_TRACE / trace
            self._cov = [[c * shrink for c in row] for row in self._cov]
