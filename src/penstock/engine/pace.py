"""Steps with prompts in them, kept short enough for those that decode beside (`TPOT`)."""

from __future__ import annotations

from penstock.engine.cost import CostFitter
from penstock.engine.scheduler.pacing import UNPACED
from penstock.engine.scheduler.sequence import Sequence
from penstock.protocol.instance import PACED_CONTEXT, PACED_TOKENS

#: Before so many steps have been seen nobody knows what a prompt token costs.
_MIN_STEPS = 8


class CostPace:
    """By the instance's own cost model, and the strictest bound of those that decode."""

    def __init__(self, cost: CostFitter) -> None:
        self._cost = cost

    def room(self, decodes: list[Sequence]) -> int:
        wanted = [s.submit.max_step_s for s in decodes if s.submit.max_step_s is not None]
        model = self._cost.model()
        if not wanted or model.num_steps < _MIN_STEPS:
            return UNPACED.room(decodes)
        context = sum([s.num_computed for s in decodes])
        step_s = (
            model.base_s
            + (len(decodes) + 1) * model.per_row_s
            + len(decodes) * model.per_token_s
            + context * (model.per_context_token_s + model.per_attention_s)
        )
        token_s = model.per_token_s + model.per_attention_s * PACED_CONTEXT
        if token_s <= 0.0:
            return UNPACED.room(decodes)
        return max(int((min(wanted) - step_s) / token_s), PACED_TOKENS)
