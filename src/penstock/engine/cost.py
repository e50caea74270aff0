"""The instance's own cost model: step time fitted online by non-negative least squares.

Features are those of `protocol.instance.CostModel`, and no coefficient is negative: nothing makes a
step shorter, and a negative one, which plain least squares finds where features move together,
predicts nonsense for any step unlike the last ones. Old steps are forgotten at a fixed rate, so the
model follows a machine whose speed drifts; but steps with prompts and steps without are forgotten
each by the next of their kind, or an instance that only decodes for a while would no longer know
what a prompt costs (in its steps tokens and rows are the same number). Errors count relative to the
step's length, as noise does. With five features the best set of non-zero ones is found by trying
them all: the solution of a non-negative least squares problem is the plain one on some subset
(Lawson and Hanson, Solving Least Squares Problems, chapter 23).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.engine.scheduler.batch import Batch
from penstock.protocol.instance import CostModel

Floats = npt.NDArray[np.float64]

_FORGET = 0.995
_NUM_FEATURES = 5
_SETTLED_STEPS = 6
#: Steps between two solutions once there are many: one costs some 100 us.
_SOLVE_EVERY = 8
# Features differ by orders of magnitude; scaled to about one, the fit stays well conditioned.
_SCALE = np.array([1.0, 1e-2, 1e-1, 1e-4, 1e-6])
#: Against directions that the steps so far say nothing about.
_RIDGE = 1e-7
#: Every way to leave some features out [subset, feature].
_SUBSETS = np.array(
    [[bool(mask >> i & 1) for i in range(_NUM_FEATURES)] for mask in range(2**_NUM_FEATURES)]
)


class CostFitter:
    """`observe` each finished step; `predict` the next; `model` is what gets published."""

    def __init__(self) -> None:
        self._weights: Floats = np.zeros(_NUM_FEATURES)
        # Decayed sums over the steps without prompts, and over those with: of x x^T and of x y,
        # each step weighted by 1 / y^2.
        self._grams: Floats = np.zeros((2, _NUM_FEATURES, _NUM_FEATURES))
        self._moments: Floats = np.zeros((2, _NUM_FEATURES))
        self._residual_s = 0.0
        self._num_steps = 0
        self._prompt_tokens = 0

    def observe(self, batch: Batch, step_s: float) -> None:
        x = _features(batch)
        predicted_s = float(self._weights @ x)
        error_s = step_s - predicted_s
        if self._num_steps:
            limit_s = 5 * self._residual_s + 0.2 * predicted_s
            self._residual_s += 0.05 * (abs(error_s) - self._residual_s)
            # One step that was interrupted says little about the next; a lasting change widens the
            # limit step by step and gets through.
            if self._num_steps >= _SETTLED_STEPS:
                step_s = predicted_s + min(max(error_s, -limit_s), limit_s)
        weight = 1.0 / max(step_s, 1e-6) ** 2
        prompts = [row.num_tokens for row in batch.rows if row.num_tokens > 1]
        self._prompt_tokens += sum(prompts)
        kind = int(bool(prompts))
        self._grams[kind] = _FORGET * self._grams[kind] + weight * np.outer(x, x)
        self._moments[kind] = _FORGET * self._moments[kind] + weight * step_s * x
        self._num_steps += 1
        if self._num_steps < 4 * _SOLVE_EVERY or self._num_steps % _SOLVE_EVERY == 0:
            self._weights = _non_negative(self._grams.sum(axis=0), self._moments.sum(axis=0))

    def predict(self, batch: Batch) -> float | None:
        """Seconds the batch will take, or None while there is nothing to go by."""
        if self._num_steps < 3:
            return None
        return float(self._weights @ _features(batch))

    @property
    def residual_s(self) -> float:
        """Mean absolute error of late."""
        return self._residual_s

    def model(self) -> CostModel:
        base, token, row, context, attention = (float(v) for v in self._weights * _SCALE)
        return CostModel(
            base, token, row, context, attention,
            self._residual_s, self._num_steps, self._prompt_tokens,
        )  # fmt: skip


def _non_negative(gram: Floats, moment: Floats) -> Floats:
    """The w >= 0 that minimises w^T gram w - 2 moment^T w."""
    gram = gram + _RIDGE * np.trace(gram) * np.eye(_NUM_FEATURES)
    # A feature that is left out keeps a row of the identity and a zero on the right: w = 0.
    both = _SUBSETS[:, :, None] & _SUBSETS[:, None, :]
    systems = np.where(both, gram, np.eye(_NUM_FEATURES))
    right = np.where(_SUBSETS, moment, 0.0)
    found = np.linalg.solve(systems, right[..., None])[..., 0]
    # At a subset's own solution the objective is -moment^T w.
    gains = np.where((found >= 0.0).all(axis=1), found @ moment, -np.inf)
    best: Floats = found[int(gains.argmax())]
    return best


def _features(batch: Batch) -> Floats:
    context = sum(row.start + row.num_tokens for row in batch.rows)
    attention = sum(row.num_tokens * (row.start + row.num_tokens) for row in batch.rows)
    raw = np.array([1.0, batch.num_tokens, len(batch.rows), context, attention], dtype=np.float64)
    scaled: Floats = raw * _SCALE
    return scaled
