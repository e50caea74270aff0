"""What shapes one row of logits before the draw: logit_bias, min_tokens, penalties.

Each is a small object held for its slot only when the request asks for it. They gather and scatter
the few ids concerned, so a penalised row costs its context length and not a pass over the
vocabulary, and nothing is read back from the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from penstock.protocol.request import SamplingParams

_GROWTH_TOKENS = 256


class Shaper(Protocol):
    """Changes one row of logits in place, for the draw of output token `position`."""

    def shape(self, logits_V: Tensor, position: int) -> None: ...

    def record(self, id_1: Tensor, position: int) -> None:
        """Output token `position` is `id_1` (int64, still on the device)."""


class LogitBias:
    def __init__(self, bias: dict[int, float], device: torch.device) -> None:
        self._ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def shape(self, logits_V: Tensor, position: int) -> None:
        logits_V[self._ids] += self._values

    def record(self, id_1: Tensor, position: int) -> None:
        pass


class MinTokens:
    """Forbids eos and the stop token ids before output token `min_tokens`."""

    def __init__(self, min_tokens: int, stop_ids: list[int], device: torch.device) -> None:
        self._min_tokens = min_tokens
        self._ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)

    def shape(self, logits_V: Tensor, position: int) -> None:
        if position < self._min_tokens:
            logits_V[self._ids] = float("-inf")

    def record(self, id_1: Tensor, position: int) -> None:
        pass


class Penalties:
    """Repetition over prompt and output (CTRL paper, as HF); presence and frequency over output.

    Holds the output so far as a list of ids, repetitions included, addressed by position. Writing
    a position again (a step done anew after preemption) therefore cannot count a token twice.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: list[int], output_ids: list[int],
        device: torch.device,
    ) -> None:  # fmt: skip
        self._params = params
        repetition = params.repetition_penalty != 1.0
        self._prompt = torch.tensor(
            list(dict.fromkeys(prompt_ids)) if repetition else [], dtype=torch.int64, device=device
        )
        self._output = torch.zeros(
            len(output_ids) + _GROWTH_TOKENS, dtype=torch.int64, device=device
        )
        self._output[: len(output_ids)] = torch.tensor(output_ids, dtype=torch.int64)

    def shape(self, logits_V: Tensor, position: int) -> None:
        output = self._output[:position]
        params = self._params
        if params.repetition_penalty != 1.0:
            # Both scatters write one value per id however often it occurs, and never compound:
            # what is scattered is computed from logits gathered before any was changed.
            seen = torch.cat((self._prompt, output))
            found = logits_V[seen]
            factor = params.repetition_penalty
            logits_V[seen] = torch.where(found > 0, found / factor, found * factor)
        if params.frequency_penalty:
            minus = torch.full_like(output, -params.frequency_penalty, dtype=torch.float32)
            logits_V.index_add_(0, output, minus)
        if params.presence_penalty:
            logits_V[output] = logits_V[output] - params.presence_penalty

    def record(self, id_1: Tensor, position: int) -> None:
        if position >= len(self._output):
            self._output = torch.cat((self._output, torch.zeros_like(self._output)))
        self._output[position : position + 1] = id_1


def shapers(
    params: SamplingParams,
    prompt_ids: list[int],
    output_ids: list[int],
    stop_ids: list[int],
    device: torch.device,
) -> list[Shaper]:
    """The objects this request needs, in the order they apply (vLLM's). Usually none.

    `stop_ids`: every id below the vocabulary size that min_tokens must hold back.
    """
    found: list[Shaper] = []
    if params.min_tokens > 0 and stop_ids:
        found.append(MinTokens(params.min_tokens, stop_ids, device))
    if params.logit_bias:
        found.append(LogitBias(params.logit_bias, device))
    if (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    ):
        found.append(Penalties(params, prompt_ids, output_ids, device))
    return found
