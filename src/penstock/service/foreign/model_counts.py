"""What was asked of each model. Clients choose the names, so there is an end to how many count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.service.instance_metrics import PREFIX

MOST_NAMES = 64
MOST_NAME_CHARS = 256
#: Whose name came too late, is too long, or has never been served.
OTHER = "other"


@dataclass(slots=True)
class ModelCount:
    requests: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class ModelCounts(Collector):
    def __init__(self) -> None:
        self._counts: dict[str, ModelCount] = {}

    def of(self, model: str | None, is_real: bool) -> ModelCount:
        """`is_real`: an engine lists it, or has answered for it; only such a name takes a place."""
        name = model or OTHER
        if name not in self._counts:
            room = len(self._counts) < MOST_NAMES and len(name) <= MOST_NAME_CHARS
            if not (is_real and room):
                name = OTHER
        return self._counts.setdefault(name, ModelCount())

    def collect(self) -> Iterator[Metric]:
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            for model, count in self._counts.items():
                counter.add_metric([model], read(count))
            yield counter

    def describe(self) -> list[Metric]:
        return []


_COUNTERS: tuple[tuple[str, str, Callable[[ModelCount], float]], ...] = (
    ("model_requests", "Requests for tokens, by the model they name.", lambda c: c.requests),
    ("model_failures", "Of them, ended with an error.", lambda c: c.failures),
    ("model_prompt_tokens", "Prompt tokens, as engines counted them or estimated.",
     lambda c: c.prompt_tokens),
    ("model_generation_tokens", "Tokens generated.", lambda c: c.generation_tokens),
)  # fmt: skip
