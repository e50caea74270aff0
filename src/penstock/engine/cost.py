"""The instance's own cost model: step time fitted online by recursive least squares.

Features are those of `protocol.instance.CostModel`. Old steps are forgotten at a fixed rate, so
the model follows a machine whose speed drifts. Recursive least squares with a forgetting factor:
Haykin, Adaptive Filter Theory, chapter 10.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.engine.scheduler.batch import Batch
from penstock.protocol.instance import CostModel

_FORGET = 0.995
_NUM_FEATURES = 5
_SETTLED_STEPS = 6
# Features differ by orders of magnitude; scaled to about one, the fit stays well conditioned.
_SCALE = np.array([1.0, 1e-2, 1e-1, 1e-4, 1e-6])


class CostFitter:
    """`observe` each finished step; `predict` the next; `model` is what gets published."""

    def __init__(self) -> None:
        self._weights = np.zeros(_NUM_FEATURES)
        self._covariance = np.eye(_NUM_FEATURES) * 1e3
        self._residual_s = 0.0
        self._num_steps = 0

    def observe(self, batch: Batch, step_s: float) -> None:
        x = _features(batch)
        predicted_s = float(self._weights @ x)
        error = step_s - predicted_s
        if self._num_steps:
            limit_s = 5 * self._residual_s + 0.2 * abs(predicted_s)
            self._residual_s += 0.05 * (abs(error) - self._residual_s)
            # One step that was interrupted says little about the next; a lasting change widens the
            # limit step by step and gets through.
            if self._num_steps >= _SETTLED_STEPS:
                error = min(max(error, -limit_s), limit_s)
        gain = self._covariance @ x / (_FORGET + x @ self._covariance @ x)
        self._weights = self._weights + gain * error
        self._covariance = (self._covariance - np.outer(gain, x @ self._covariance)) / _FORGET
        # Without excitation in some direction forgetting inflates it without bound; cap the trace.
        trace = float(np.trace(self._covariance))
        if trace > 1e6:
            self._covariance *= 1e6 / trace
        self._num_steps += 1

    def predict(self, batch: Batch) -> float | None:
        """Seconds the batch will take, or None while there is nothing to go by."""
        if self._num_steps < 3:
            return None
        return max(0.0, float(self._weights @ _features(batch)))

    @property
    def residual_s(self) -> float:
        """Mean absolute error of late."""
        return self._residual_s

    def model(self) -> CostModel:
        base, token, row, context, attention = (float(v) for v in self._weights * _SCALE)
        return CostModel(base, token, row, context, attention, self._residual_s, self._num_steps)


def _features(batch: Batch) -> npt.NDArray[np.float64]:
    context = sum(row.start + row.num_tokens for row in batch.rows)
    attention = sum(row.num_tokens * (row.start + row.num_tokens) for row in batch.rows)
    raw = np.array([1.0, batch.num_tokens, len(batch.rows), context, attention], dtype=np.float64)
    scaled: npt.NDArray[np.float64] = raw * _SCALE
    return scaled
