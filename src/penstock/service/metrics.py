"""What /metrics says: vLLM's metrics under the prefix `penstock:`, with vLLM's meanings.

All of it is counted in the one thread that runs the service's loop, so a count is an addition and
no lock; prometheus-client only writes the result down. A sequence (one choice of one prompt) is
waiting until its first token, then running, and leaves both when it ends: whichever way it ends,
`RequestMetrics.close` takes back what is left.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from penstock.service.generation import ServiceStatus
from penstock.service.instance_metrics import PREFIX, instance_families
from penstock.service.policies.view import WayKind
from penstock.service.recent import Rate, Recent
from penstock.service.recovery import Recovered

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: What vLLM calls the ways in which a request ends; a cancel by the client is an abort.
REASONS = ("stop", "length", "abort", "error")

_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Histogram:
    """Counts by bucket; `bounds` are inclusive upper bounds, ascending."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def cumulative(self) -> list[tuple[str, float]]:
        out, seen = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts):
            seen += count
            out.append(("+Inf" if bound == float("inf") else repr(bound), float(seen)))
        return out


_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Time from arrival to the first token.", _TTFT_S),
    "inter_token_latency_seconds": ("Time between one token and the next.", _TOKEN_S),
    "request_time_per_output_token_seconds": ("Mean time per token after the first.", _TOKEN_S),
    "e2e_request_latency_seconds": ("Time from arrival to the last token.", _REQUEST_S),
    "request_queue_time_seconds": ("Time in the engine's queue.", _REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a sequence.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a sequence.", _TOKENS),
    "request_params_max_tokens": ("max_tokens of a request.", _TOKENS),
    "request_params_n": ("n of a request.", _CHOICES),
}


_RECOVERIES: dict[str, tuple[str, Callable[[Recovered], float]]] = {
    "recoveries": ("Interrupted sequences that went on.", lambda r: r.num),
    "recovery_recomputed_tokens": (
        "Tokens that they had to compute again.", lambda r: r.recomputed_tokens,
    ),
    "recovery_waited_seconds": (
        "From where the service knew to the next token, summed.", lambda r: r.waited_s,
    ),
    "recovery_predictions": (
        "Those whose time from the new placement to the next token was predicted.",
        lambda r: r.num_predicted,
    ),
    "recovery_predicted_seconds": ("Sum of the predictions.", lambda r: r.predicted_s),
    "recovery_actual_seconds": ("Sum of what it took.", lambda r: r.actual_s),
    "recovery_prediction_error_seconds": (
        "Sum of |predicted - actual|.", lambda r: r.error_s,
    ),
}  # fmt: skip

_FROM_ENGINES = "request_queue_time_seconds"


class Metrics(Collector):
    """One for each service process."""

    def __init__(self, model_name: str, status: Callable[[], ServiceStatus] | None = None) -> None:
        self.model_name = model_name
        self.clock = time.perf_counter
        self.started_s = self.clock()
        self.waiting = 0
        self.running = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        #: The same for eyes: what /admin/cluster and `penstock top` show.
        self.recent_ttft_s, self.recent_tpot_s = Recent(), Recent()
        self.request_rate, self.token_rate = Rate(), Rate()
        self._status = status
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def start_request(
        self, num_prompt_tokens: Sequence[int], n: int, max_tokens: int
    ) -> RequestMetrics:
        """A request of `n` choices for each prompt has been accepted."""
        self.histograms["request_params_n"].observe(n)
        self.histograms["request_params_max_tokens"].observe(max_tokens)
        return RequestMetrics(self, num_prompt_tokens, n)

    def on_refused(self, code: str) -> None:
        """A request ended with an error before it had begun to generate."""
        self.refused[code] += 1

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        for name, (text, _) in _HISTOGRAMS.items():
            found = self.histograms[name]
            if name == _FROM_ENGINES and not any(found.counts):
                continue  # no engine says: better no figure than one that looks like none waited
            family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
            family.add_metric([self.model_name], found.cumulative(), found.total)
            yield family
        if self._status is not None:
            status = self._status()
            yield from self._moves(status)
            yield from instance_families(self.model_name, status.instances)

    def _moves(self, status: ServiceStatus) -> Iterator[Metric]:
        facts = status.facts
        counters = {
            "sequences_resumed": (
                "Sequences that went on after they had lost an instance.",
                status.num_resumed,
            ),
            "sequences_handed_over": (
                "Sequences prefilled in one place that went on in another.",
                facts.get("handovers", 0),
            ),
            "sequences_migrated": (
                "Sequences that left an instance that was well.",
                facts.get("migrated", 0),
            ),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self.model_name], value)
            yield counter
        yield from self._recoveries(facts.get("recoveries", {}))

    def _recoveries(self, by_way: Mapping[WayKind, Recovered]) -> Iterator[Metric]:
        """Of sequences that were interrupted, by how they went on."""
        for name, (text, read) in _RECOVERIES.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name", "way"])
            for way, sums in by_way.items():
                counter.add_metric([self.model_name, way], read(sums))
            yield counter

    def describe(self) -> list[Metric]:
        return []  # nothing to check against: the registry is our own

    def _requests(self) -> Iterator[Metric]:
        label = [self.model_name]
        gauges = {
            "num_requests_running": ("Sequences that are generating.", self.running),
            "num_requests_waiting": ("Sequences that wait for their first token.", self.waiting),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric(label, value)
            yield gauge
        counters = {
            "prompt_tokens": ("Prompt tokens processed.", self.prompt_tokens),
            "prompt_tokens_cached": ("Of them, found in a cache.", self.cached_prompt_tokens),
            "generation_tokens": ("Tokens generated.", self.generation_tokens),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric(label, value)
            yield counter
        ends = CounterMetricFamily(
            PREFIX + "request_success",
            "Sequences that have ended, by how.",
            labels=["model_name", "finished_reason"],
        )
        for reason in REASONS:
            ends.add_metric([*label, reason], self.finished[reason])
        yield ends
        refused = CounterMetricFamily(
            PREFIX + "requests_refused",
            "Requests that ended with an error before they generated.",
            labels=["model_name", "code"],
        )
        for code in sorted(self.refused):
            refused.add_metric([*label, code], self.refused[code])
        yield refused


class RequestMetrics:
    """What one request counts as it goes on; `close` ends it, however it ended."""

    __slots__ = (
        "_arrived_s",
        "_closed",
        "_first_s",
        "_last_s",
        "_metrics",
        "_n",
        "_num_tokens",
        "_open",
        "_prompt_tokens",
    )

    def __init__(self, metrics: Metrics, prompt_tokens: Sequence[int], n: int) -> None:
        size = n * len(prompt_tokens)
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._n = n
        self._arrived_s = time.perf_counter()
        self._first_s = [0.0] * size
        self._last_s = [0.0] * size
        self._num_tokens = [0] * size
        self._open = [True] * size
        self._closed = False
        metrics.waiting += size

    def on_tokens(self, choice: int, count: int) -> None:
        """`count` new tokens of an open choice: the hot path."""
        metrics = self._metrics
        now_s = time.perf_counter()
        metrics.generation_tokens += count
        metrics.token_rate.add(count, now_s)
        if self._num_tokens[choice]:
            gap_s = (now_s - self._last_s[choice]) / count
            metrics.histograms["inter_token_latency_seconds"].observe(gap_s, count)
        else:
            self._on_first(choice, now_s)
        self._num_tokens[choice] += count
        self._last_s[choice] = now_s

    def on_queue_time(self, queue_s: float) -> None:
        self._metrics.histograms[_FROM_ENGINES].observe(queue_s)

    def on_finish(self, choice: int, reason: str) -> None:
        """The choice has ended, with "stop" or "length"."""
        metrics = self._metrics
        if not self._open[choice]:
            return
        self._leave(choice, reason)
        count = self._num_tokens[choice]
        now_s = time.perf_counter()
        metrics.histograms["e2e_request_latency_seconds"].observe(now_s - self._arrived_s)
        metrics.histograms["request_generation_tokens"].observe(count)
        if count > 1:
            spent_s = self._last_s[choice] - self._first_s[choice]
            name = "request_time_per_output_token_seconds"
            metrics.histograms[name].observe(spent_s / (count - 1))
            metrics.recent_tpot_s.add(spent_s / (count - 1), now_s)

    def close(self, reason: str, cached_tokens: int = 0) -> None:
        """The request is over; choices that are still open end with `reason`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._metrics.cached_prompt_tokens += cached_tokens
        for choice, is_open in enumerate(self._open):
            if is_open:
                self._leave(choice, reason)

    def _on_first(self, choice: int, now_s: float) -> None:
        metrics = self._metrics
        metrics.waiting -= 1
        metrics.running += 1
        self._first_s[choice] = now_s
        metrics.histograms["time_to_first_token_seconds"].observe(now_s - self._arrived_s)
        metrics.recent_ttft_s.add(now_s - self._arrived_s, now_s)
        prompt = choice // self._n
        if not any(self._num_tokens[prompt * self._n : (prompt + 1) * self._n]):
            metrics.prompt_tokens += self._prompt_tokens[prompt]
        metrics.histograms["request_prompt_tokens"].observe(self._prompt_tokens[prompt])

    def _leave(self, choice: int, reason: str) -> None:
        metrics = self._metrics
        self._open[choice] = False
        if self._num_tokens[choice]:
            metrics.running -= 1
        else:
            metrics.waiting -= 1
        metrics.finished[reason] += 1
        metrics.request_rate.add(1, time.perf_counter())
