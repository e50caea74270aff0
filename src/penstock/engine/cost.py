"""The instance's own cost model: step time fitted online by non-negative least squares.

Features are those of `protocol.instance.CostModel`, and no coefficient is negative: nothing makes a
step shorter, and a negative one, which plain least squares finds where features move together,
predicts nonsense for any step unlike the last ones. Old steps are forgotten at a fixed rate, so the
model follows a machine whose speed drifts; but steps with prompts and steps without are forgotten
each by the next of their kind, or an instance that only decodes for a while would no longer know
what a prompt costs (in its steps tokens and rows are the same number). Errors count relative to the
step's predicted length, as noise does; relative to what was measured, a step that noise made slow
would count for less than one that it made quick, and the model would come out too quick (by 30%
with noise of 40%). With five features the best set of non-zero ones is found by trying them all:
the solution of a non-negative least squares problem is the plain one on some subset (Lawson and
Hanson, Solving Least Squares Problems, chapter 23).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.engine.scheduler.batch import Batch
from penstock.engine.step_times import StepTimes
from penstock.protocol.instance import CostModel

Floats = npt.NDArray[np.float64]
#: Scaled features of a step, or their weights.
Vector = tuple[float, float, float, float, float]

_FORGET = 0.995
_NUM_FEATURES = 5
_SETTLED_STEPS = 6
#: A prediction of next to nothing must not make its step count for all others.
_LEAST_SCALE = 0.25
#: Batches between two solutions once there are many; fewer of them are needed while nothing errs by
#: more than this share, as on a simulated device. What is not found surprising there should not be
#: seen in a load either: steps and runs of steps lead to solutions at other times.
_SOLVE_EVERY = 8
_SURPRISE = 1e-5
# Features differ by orders of magnitude; scaled to about one, the fit stays well conditioned.
_SCALE: Vector = (1.0, 1e-2, 1e-1, 1e-4, 1e-6)
#: Against directions that the steps so far say nothing about.
_RIDGE = 1e-7
#: Every way to leave some features out [subset, feature].
_SUBSETS = np.array(
    [[bool(mask >> i & 1) for i in range(_NUM_FEATURES)] for mask in range(2**_NUM_FEATURES)]
)
_PLACES = [np.flatnonzero(subset) for subset in _SUBSETS]


class Features(NamedTuple):
    """Of a batch, summed over the rows of its first step; each further step of a run reads one
    token more in each row."""

    tokens: int
    rows: int
    context: int
    attention: int
    prompt_tokens: int  # of rows with more than one
    steps: int

    @classmethod
    def of(cls, batch: Batch) -> Features:
        tokens = context = attention = prompt_tokens = 0
        for row in batch.rows:
            new = row.num_tokens
            read = row.start + new
            tokens += new
            context += read
            attention += new * read
            if new > 1:
                prompt_tokens += new
        return cls(tokens, len(batch.rows), context, attention, prompt_tokens, batch.steps)

    def scaled(self) -> Vector:
        """Of a mean step."""
        more = self.rows * (self.steps - 1) / 2
        _, tokens, rows, context, attention = _SCALE
        return (
            1.0,
            self.tokens * tokens,
            self.rows * rows,
            (self.context + more) * context,
            (self.attention + more) * attention,
        )


class _Seen(NamedTuple):
    """A batch that the next solution will take into account."""

    x: Vector
    step_s: float
    weight: float
    kept: float  # how much of what was seen before it is not forgotten


class CostFitter:
    """`observe` each finished batch; `predict` the next; `model` is what gets published."""

    def __init__(self) -> None:
        self._weights: Vector = (0.0,) * 5
        # Decayed sums over the steps without prompts, and over those with: of x x^T and of x y,
        # each step weighted by one over the square of its predicted length.
        self._grams: Floats = np.zeros((2, _NUM_FEATURES, _NUM_FEATURES))
        self._moments: Floats = np.zeros((2, _NUM_FEATURES))
        self._unsolved: tuple[list[_Seen], list[_Seen]] = ([], [])
        self._subset = 0
        self._residual_s = 0.0
        self._num_steps = 0
        self._prompt_tokens = 0
        self._num_batches = 0
        self._was_surprised = False
        self._model: CostModel | None = None

    def observe(self, features: Features, seconds: float) -> None:
        """A batch took so long, all of its steps together."""
        self._model = None
        steps, before = features.steps, self._num_steps
        x, step_s = features.scaled(), seconds / features.steps
        predicted_s = _dot(self._weights, x)
        error_s = step_s - predicted_s
        scale_s = step_s
        if before:
            limit_s = 5 * self._residual_s + 0.2 * predicted_s
            size_s = abs(error_s)
            self._residual_s = size_s + 0.95**steps * (self._residual_s - size_s)
            # One step that was interrupted says little about the next; a lasting change widens the
            # limit step by step and gets through.
            if before >= _SETTLED_STEPS:
                step_s = predicted_s + min(max(error_s, -limit_s), limit_s)
                scale_s = max(predicted_s, _LEAST_SCALE * step_s)
        kept = _FORGET**steps
        weight = (1.0 - kept) / (1.0 - _FORGET) / max(scale_s, 1e-6) ** 2
        kind = 1 if features.prompt_tokens else 0
        self._unsolved[kind].append(_Seen(x, step_s, weight, kept))
        self._prompt_tokens += features.prompt_tokens
        self._num_steps += steps
        self._num_batches += 1
        surprise = abs(error_s) > _SURPRISE * step_s
        self._was_surprised |= surprise
        # A run is predicted once for all of its steps, so that an error counts for each of them.
        every = _SOLVE_EVERY if self._was_surprised else 16 * _SOLVE_EVERY
        due = before < 4 * _SOLVE_EVERY or self._num_batches % every == 0
        if due or (surprise and steps > 1):
            self._solve()

    def predict(self, features: Features) -> StepTimes | None:
        """How long the steps of a batch will take; None while there is nothing to go by."""
        if self._num_steps < 3:
            return None
        weights = self._weights
        _, tokens, rows, context, attention = _SCALE
        context_s, attention_s = weights[3] * context, weights[4] * attention
        first_s = (
            weights[0]
            + weights[1] * tokens * features.tokens
            + weights[2] * rows * features.rows
            + context_s * features.context
            + attention_s * features.attention
        )
        return StepTimes(first_s, (context_s + attention_s) * features.rows, features.steps)

    @property
    def residual_s(self) -> float:
        """Mean absolute error of late."""
        return self._residual_s

    def model(self) -> CostModel:
        """What is known now; worked out once for all who ask between two batches."""
        if self._model is None:
            self._model = self._make_model()
        return self._model

    def _make_model(self) -> CostModel:
        base, token, row, context, attention = (w * s for w, s in zip(self._weights, _SCALE))
        return CostModel(
            base, token, row, context, attention,
            self._residual_s, self._num_steps, self._prompt_tokens,
        )  # fmt: skip

    def _solve(self) -> None:
        for kind, seen in enumerate(self._unsolved):
            if not seen:
                continue
            kept, weights = 1.0, []
            for batch in reversed(seen):
                weights.append(batch.weight * kept)
                kept *= batch.kept
            x_BF = np.array([batch.x for batch in seen])
            weighted_FB = x_BF.T * weights[::-1]
            self._grams[kind] = kept * self._grams[kind] + weighted_FB @ x_BF
            steps_B = np.array([batch.step_s for batch in seen])
            self._moments[kind] = kept * self._moments[kind] + weighted_FB @ steps_B
            seen.clear()
        gram, moment = self._grams[0] + self._grams[1], self._moments[0] + self._moments[1]
        found, self._subset = _non_negative(gram, moment, self._subset)
        self._was_surprised = False
        base, token, row, context, attention = found.tolist()
        self._weights = base, token, row, context, attention


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + a[4] * b[4]


def _non_negative(gram: Floats, moment: Floats, guess: int) -> tuple[Floats, int]:
    """The w >= 0 that minimises w^T gram w - 2 moment^T w, and which subset of the features it is
    the solution on. Most times it is the one of the last time (`guess`)."""
    gram = gram.copy()
    gram.flat[:: _NUM_FEATURES + 1] += _RIDGE * gram.trace()
    places = _PLACES[guess]
    found: Floats = np.zeros(_NUM_FEATURES)
    found[places] = np.linalg.solve(gram[places[:, None], places], moment[places])
    slopes = gram @ found - moment
    slopes[places] = 0.0
    # No step downhill from there: the problem is convex, so that is the solution.
    if found.min() >= 0.0 and slopes.min() >= 0.0:
        return found, guess
    # A feature that is left out keeps a row of the identity and a zero on the right: w = 0.
    both = _SUBSETS[:, :, None] & _SUBSETS[:, None, :]
    systems = np.where(both, gram, np.eye(_NUM_FEATURES))
    right = np.where(_SUBSETS, moment, 0.0)
    solutions = np.linalg.solve(systems, right[..., None])[..., 0]
    # At a subset's own solution the objective is -moment^T w.
    gains = np.where((solutions >= 0.0).all(axis=1), solutions @ moment, -np.inf)
    best = int(gains.argmax())
    return solutions[best], best
