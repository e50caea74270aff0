"""What an engine's warm-up leaves in its cost model: a start that is not from nothing.

Production draws a prompt twice before anybody may attach (`InstanceDriver.warm_up`); the second
time counts, with half of the prompt in the cache.
"""

from __future__ import annotations

from penstock.engine.core import InstanceCore
from penstock.engine.cost import Features
from penstock.engine.scheduler.batch import Batch, BatchRow
from penstock.simulator.pacing import StepCost

#: (cached, new) tokens of each of its steps.
_STEPS = ((16, 16), (32, 1), (33, 1), (34, 1))


def calibrate(core: InstanceCore, cost: StepCost) -> None:
    for step, (start, new) in enumerate(_STEPS):
        batch = Batch(step, [BatchRow(0, start, new, True)])
        core.cost.observe(Features.of(batch), cost.of(batch).total_s)
