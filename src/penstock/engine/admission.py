"""What a `Submit` must satisfy before the scheduler sees it."""

from __future__ import annotations

from array import array

import numpy as np

from penstock.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.protocol.request import Submit


def check_supported(submit: Submit) -> None:
    """What the protocol can say but this engine cannot do yet is refused by its name."""
    if submit.adapter is not None:
        raise UnsupportedFeature("adapters are not supported by this engine yet", param="adapter")
    if submit.inputs:
        kinds = ", ".join(sorted({part.kind for part in submit.inputs}))
        raise UnsupportedFeature(f"inputs of kind {kinds} are not supported yet", param="inputs")
    if any(stage.stage == "encode" for stage in submit.plan):
        raise UnsupportedFeature("a stage of encoding is not supported yet", param="plan")
    if submit.ttft_budget_s is not None:
        raise UnsupportedFeature("a bound on TTFT is not supported yet", param="ttft_budget_s")


def check_ids(submit: Submit, vocab_size: int) -> None:
    """The service has checked what users send. This is for services that are wrong: an id without
    an embedding would fail the step of everybody else in it."""
    for name, ids in (("prompt_ids", submit.prompt_ids), ("resumed_ids", submit.resumed_ids)):
        if ids and not 0 <= _largest(ids) < vocab_size:
            raise InvalidRequest(f"{name} must be in [0, {vocab_size})", param=name)
    if not 0 <= submit.choice < 2**32:
        raise InvalidRequest(f"choice {submit.choice} must be in [0, 2**32)", param="choice")


def _largest(ids: list[int]) -> int:
    """-1 where one of them is negative or beyond 32 bits. (Prompts are long, and `min` and `max`
    take four times as long.)"""
    try:
        words = array("I", ids)
    except OverflowError:
        return -1
    return int(np.frombuffer(words, np.uint32).max())
