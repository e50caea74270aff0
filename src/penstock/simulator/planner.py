"""`penstock plan`: the search of `planning.py` with simulations behind it, and how sure they are.

The SLO is to hold in the busiest stretch of the trace, where the search looks, and over all of it.
What the search finds is tried on trace after trace like this one (arrivals as recorded, lengths
dealt out anew), on the whole trace, and with steps slower and faster by the error of the cost
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock import __version__
from penstock.loadgen.costs import find_hardware, hardware, known_hardware
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.simulator.crew import Crew, Progress, Task
from penstock.simulator.outcome import Outcome
from penstock.simulator.planning import (
    Candidate,
    Reach,
    Search,
    Shape,
    cheaper,
    larger,
    least_instances,
    prefill_share,
    reach,
)
from penstock.simulator.quantities import ms
from penstock.simulator.spec import ClusterSpec, LinkSpec, PoolSpec
from penstock.simulator.stretch import busiest

#: Plans that are confirmed: the cheapest and its runners-up.
SHOWN = 3
#: By how much more steps may take (or less) than the cost model says: the median error against
#: engines that were measured end to end and not fitted to (`python -m benchmarks.cost_models`).
MODEL_ERROR = 0.13
_WIDENINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`gpu_hour`: price by GPU; GPUs of `hardware` and dtypes of `dtypes` are considered."""

    hardware: tuple[str, ...]
    model: str
    dtypes: tuple[str, ...]
    gpu_hour: dict[str, float]
    ttft_slo_s: float
    tpot_slo_s: float
    wanted: float = 0.9
    max_gpus: int = 64
    window_s: float | None = 600.0
    seeds: int = 3
    mode: str = "exact"
    policy: str = "slo-aware"
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    kv_gbit: float = 100.0
    model_error: float = MODEL_ERROR


@dataclass(frozen=True, slots=True)
class Measured:
    """`ttft_s`, `tpot_s`: what the wanted share of the requests had at most."""

    attainment: float
    ttft_s: float
    tpot_s: float
    busy: float
    output_tokens_per_s: float


class Measure:
    """Of an outcome, what planning keeps. (A class, since it has to be sent to processes.)"""

    def __init__(self, wanted: float) -> None:
        self._wanted = wanted

    def __call__(self, outcome: Outcome, task: Task) -> Measured:
        spec = outcome.spec
        assert spec.ttft_slo_s is not None and spec.tpot_slo_s is not None
        span_s = outcome.span_s
        busy = [float(np.mean(s.busy)) for s in outcome.samples if 0 < s.at_s <= span_s + 1]
        return Measured(
            float(outcome.attained(spec.ttft_slo_s, spec.tpot_slo_s).mean()),
            *outcome.held_s(self._wanted),
            float(np.mean(busy)) if busy else 0.0,
            float(np.nansum(outcome.output_tokens)) / span_s,
        )


class Planner:
    """One question about one trace."""

    def __init__(
        self, question: Question, requests: Sequence[TraceRequest], crew: Crew[Measured]
    ) -> None:
        self.question = question
        self._requests, self._crew = requests, crew
        self._stretch = busiest(requests, question.window_s)
        self._is_whole = len(self._stretch) == len(requests)
        #: Hardware that is left out, and why.
        self.left_out: dict[str, str] = {}
        self._measured: dict[Task, Measured] = {}

    def plan(self, tell: Callable[[str], Progress]) -> dict[str, Any]:
        """The report. `tell(what)` gives what to tell the progress of `what` to. Raises
        `ConfigError` where no number of instances could keep the SLO."""
        q = self.question
        shapes = self._shapes()
        search = Search(shapes, q.wanted, q.max_gpus)
        rounds = 0
        while asked := search.wants():
            rounds += 1
            self._run([self._task(c) for c in asked], tell(f"searching, round {rounds}"))
            search.take({c: self._of(c).attainment for c in asked})
        confirmed, failed = self._confirm(search.found(), tell("confirming"))
        attained = dict(search.attained)
        if confirmed:
            less = smaller(confirmed[0])
            self._run([self._task(c) for c in less], tell("one instance less"))
            attained |= {c: self._of(c).attainment for c in less}
        plans = [self._plan(c, attained) for c in confirmed]
        if plans:
            self._larger_if_slow(confirmed[0], plans[0], tell("one instance more"))
        nearest = None if plans else search.nearest()
        return {
            **self._about(),
            "least_gpus": min(shape.least * shape.gpus for shape in shapes),
            "runs": len(self._measured),
            "plans": plans,
            "failed": [self._row(c) for c in failed],
            "nearest": None if nearest is None else self._row(nearest),
            "left_out": self.left_out,
        }

    # --- what to look at ---------------------------------------------------------------------

    def _shapes(self) -> list[Shape]:
        q, found, reached = self.question, [], {}
        for name in self._names():
            model = hardware(name, q.max_num_batched_tokens, q.max_num_seqs)
            longest = max(r.input_tokens + r.output_tokens for r in self._requests)
            if longest > model.kv_tokens:
                self.left_out[name] = (
                    f"has room for {model.kv_tokens} tokens of KV, and the longest request has "
                    f"{longest}"
                )
                continue
            can = reach([model], self._stretch, q.ttft_slo_s, q.tpot_slo_s, q.wanted)
            reached[name] = can
            if can.share < q.wanted:
                self.left_out[name] = _too_slow(can)
                continue
            args = self._stretch, q.ttft_slo_s, q.tpot_slo_s, q.wanted
            gpu = name.partition(":")[0]
            found.append(
                Shape(
                    name,
                    model.gpus,
                    q.gpu_hour[gpu],
                    least_instances(model, *args),
                    prefill_share(model, self._stretch, q.tpot_slo_s),
                )
            )
        if not found:
            self._nobody(reached)
        return found

    def _names(self) -> list[str]:
        q = self.question
        found = []
        for gpu in q.hardware:
            for dtype in q.dtypes:
                of = [n for n in known_hardware() if n.startswith(f"{gpu}:{q.model}:{dtype}:")]
                if not of:
                    self.left_out[f"{gpu}:{q.model}:{dtype}"] = "there is no cost model of it"
                found += of
        if not found:
            find_hardware(f"{q.hardware[0]}:{q.model}:{q.dtypes[0]}")  # raises, and says why
        return found

    def _nobody(self, reached: dict[str, Reach]) -> None:
        q = self.question
        wanted = f"{100 * q.wanted:g}%"
        reasons = "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
        if not reached:
            raise ConfigError(f"nothing that was asked for holds the trace: {reasons}")
        raise ConfigError(
            f"nobody can hold TTFT {ms(q.ttft_slo_s)} and TPOT {ms(q.tpot_slo_s)} for {wanted} of "
            f"these requests, with any number of GPUs. With each request alone on an instance, "
            f"{wanted} of them have at best {'; '.join(_best(reached))}. Ask for more than that, "
            "for other GPUs or bits, or for a smaller --attainment"
        )

    # --- running -----------------------------------------------------------------------------

    def _task(
        self, candidate: Candidate, *, seed: int = 0, whole: bool = False, slowdown: float = 1.0
    ) -> Task:
        q = self.question
        spec = ClusterSpec(
            name="plan",
            pools=(
                PoolSpec(
                    count=candidate.count,
                    hardware=candidate.shape.hardware,
                    max_num_batched_tokens=q.max_num_batched_tokens,
                    max_num_seqs=q.max_num_seqs,
                    max_model_len=1 << 30,
                    slowdown=slowdown,
                    gpu_hour_usd=candidate.shape.gpu_hour,
                ),
            ),
            policy=q.policy,
            pd=candidate.pd,
            ttft_slo_s=q.ttft_slo_s,
            tpot_slo_s=q.tpot_slo_s,
            link=LinkSpec(kv_gbit=q.kv_gbit),
        )
        window_s = None if whole or self._is_whole else q.window_s
        return Task(spec=spec, seed=seed, mode=q.mode, window_s=window_s, deal=seed)

    def _run(self, tasks: Sequence[Task], progress: Progress) -> None:
        new = [task for task in dict.fromkeys(tasks) if task not in self._measured]
        if new:
            self._measured.update(zip(new, self._crew.run(new, progress)))

    def _of(self, candidate: Candidate) -> Measured:
        return self._measured[self._task(candidate)]

    def _checks(self, candidate: Candidate) -> dict[str, list[Task]]:
        seeds, error = range(self.question.seeds), self.question.model_error
        return {
            "busiest": [self._task(candidate, seed=s) for s in seeds],
            "whole": [self._task(candidate, seed=s, whole=True) for s in seeds],
            "slower": [self._task(candidate, slowdown=1 + error)],
            "faster": [self._task(candidate, slowdown=1 / (1 + error))],
        }

    def _confirm(
        self, found: Sequence[Candidate], progress: Progress
    ) -> tuple[list[Candidate], list[Candidate]]:
        """The cheapest that hold on every trace, and those that did not; each of the latter is
        followed up by the same with one instance more."""
        left = list(found)
        confirmed: list[Candidate] = []
        failed: list[Candidate] = []
        while left and len(confirmed) < SHOWN:
            left.sort(key=lambda c: c.order)
            candidate = left.pop(0)
            self._run([t for tasks in self._checks(candidate).values() for t in tasks], progress)
            if self._holds(candidate):
                confirmed.append(candidate)
                continue
            failed.append(candidate)
            more = larger(candidate)
            tried = sum((c.shape, c.kind) == (more.shape, more.kind) for c in failed)
            if more.gpus <= self.question.max_gpus and tried <= _WIDENINGS:
                left.append(more)
        return confirmed, failed

    def _holds(self, candidate: Candidate) -> bool:
        checks, wanted = self._checks(candidate), self.question.wanted
        return all(
            float(np.mean([self._measured[t].attainment for t in checks[which]])) >= wanted
            for which in ("busiest", "whole")
        )

    def _larger_if_slow(self, best: Candidate, plan: dict[str, Any], progress: Progress) -> None:
        if plan["slower"] >= self.question.wanted:
            return
        more = larger(best)
        task = self._task(more, slowdown=1 + self.question.model_error)
        self._run([task], progress)
        plan["one_more_if_slower"] = self._named(more) | {
            "attainment": self._measured[task].attainment
        }

    # --- the report --------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        q, stretch = self.question, self._stretch
        seconds = stretch[-1].arrival_s
        return {
            "penstock": __version__,
            "requests": len(self._requests),
            "seconds": self._requests[-1].arrival_s,
            "busiest": {
                "is_whole": self._is_whole,
                "requests": len(stretch),
                "seconds": seconds,
                "requests_per_s": len(stretch) / seconds if seconds else None,
            },
            "slo": {"ttft_s": q.ttft_slo_s, "tpot_s": q.tpot_slo_s, "attainment": q.wanted},
            "max_gpus": q.max_gpus,
            "gpu_hour": q.gpu_hour,
            "seeds": q.seeds,
            "mode": q.mode,
            "model_error": q.model_error,
        }

    def _named(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "hardware": candidate.shape.hardware,
            "instances": candidate.count,
            "gpus": candidate.gpus,
            "pd": candidate.pd,
            "cost_per_hour": candidate.cost,
        }

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        found = self._of(candidate)
        return self._named(candidate) | {
            "attainment": found.attainment,
            "ttft_s": _finite(found.ttft_s),
            "tpot_s": _finite(found.tpot_s),
            "busy": found.busy,
        }

    def _plan(self, candidate: Candidate, attained: Mapping[Candidate, float]) -> dict[str, Any]:
        checks = {
            which: [self._measured[t].attainment for t in tasks]
            for which, tasks in self._checks(candidate).items()
        }
        whole = self._measured[self._task(candidate, whole=True)]
        tokens = whole.output_tokens_per_s * 3600
        less = cheaper(candidate, attained)
        return self._row(candidate) | {
            "busiest": _spread(checks["busiest"]),
            "whole": _spread(checks["whole"]),
            "slower": checks["slower"][0],
            "faster": checks["faster"][0],
            "cost_per_million_output_tokens": candidate.cost / tokens * 1e6 if tokens else None,
            "least_instances": candidate.shape.least,
            "one_less": None if less is None else self._named(less[0]) | {"attainment": less[1]},
        }


def smaller(candidate: Candidate) -> list[Candidate]:
    """One instance less; of a split, of either side. Of two, one is left, which does both."""
    shape, count = candidate.shape, candidate.count - 1
    if count <= 1:
        return [Candidate(shape, count, "off")] if count else []
    if candidate.kind != "split":
        return [Candidate(shape, count, candidate.pd)]
    prefill, decode = (int(n) for n in candidate.pd.split(":"))
    found = [(prefill - 1, decode), (prefill, decode - 1)]
    return [Candidate(shape, count, f"{p}:{d}") for p, d in found if p and d]


def _spread(shares: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(shares)), "least": min(shares), "most": max(shares)}


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _best(reached: Mapping[str, Reach]) -> list[str]:
    """By GPU and dtype, what the fastest of its instances can do."""
    fastest: dict[str, str] = {}
    for name, can in reached.items():
        kind = name.rpartition(":")[0]
        if kind not in fastest or can.order < reached[fastest[kind]].order:
            fastest[kind] = name
    return [f"{reached[name]} on {name}" for name in fastest.values()]


def _too_slow(can: Reach) -> str:
    return f"could keep {100 * can.share:.1f}% at most, each request alone on an instance"
