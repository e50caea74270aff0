"""Is prefill apart from decode better for this trace, on these instances, for these SLOs?

Each setup (all instances doing both, every fixed split, and roles that follow the work) serves the
same stretch of the trace in the simulator; what is advised is what keeps the most requests within
the SLOs, and the simpler setup where that makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penstock.loadgen.costs import InstanceModel, hardware_or_file
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.simulator.crew import Crew, Progress, Task
from penstock.simulator.outcome import Outcome
from penstock.simulator.planning import Reach, reach
from penstock.simulator.quantities import ms
from penstock.simulator.spec import ClusterSpec, LinkSpec, PoolSpec
from penstock.simulator.stretch import busiest, faster

#: A setup has to keep this much more of the requests within the SLOs to be worth its trouble; or
#: shorten the 99th percentile of gaps between tokens by this factor.
WORTH_ATTAINED = 0.01
WORTH_GAP = 1.5
#: Below this nobody is served well: the advice is about more instances then.
ENOUGH_ATTAINED = 0.9
_ENOUGH = f"{100 * ENOUGH_ATTAINED:.0f}%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`hardware`: a known name, or a file with a cost model."""

    hardware: str
    instances: int
    ttft_slo_s: float
    tpot_slo_s: float
    step_tokens: int = 2048
    max_running: int = 256
    #: What blocks travel over between two instances, in Gbit/s.
    link_gbit: float = 100.0
    #: The busiest stretch of so many seconds is simulated; None: all of it.
    window_s: float | None = 120.0
    #: The trace comes so many times as fast.
    speed: float = 1.0
    mode: str = "exact"

    @property
    def model(self) -> InstanceModel:
        return hardware_or_file(self.hardware, self.step_tokens, self.max_running)


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of one setup: "together", "auto" or "P:D"."""

    setup: str
    ttft_s: np.ndarray
    #: Seconds a token after the first, of each request that has more than one.
    tpot_s: np.ndarray
    #: 99th percentile of single gaps between two tokens.
    gap_p99_s: float
    #: Share of requests with both TTFT and TPOT within the SLOs.
    attained: float
    #: The TTFT, and the TPOT, that `ENOUGH_ATTAINED` of the requests had at most.
    held_s: tuple[float, float]
    num_split: int
    role_changes: int
    utilisation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    question: Question
    simulated: tuple[Simulated, ...]
    best: Simulated
    together: Simulated
    #: Sentences, with the numbers that decided.
    because: tuple[str, ...]
    work: dict[str, float]

    @property
    def splits(self) -> bool:
        return self.best is not self.together


def advise(
    requests: Sequence[TraceRequest],
    question: Question,
    *,
    jobs: int = 1,
    progress: Progress = lambda shares: None,
) -> Advice:
    """Raises `ConfigError` where no setup could ever keep the SLOs."""
    chosen = busiest(faster(requests, question.speed), question.window_s)
    work = _work(chosen, question)
    least = _check_possible(chosen, question)
    setups = _setups(question)
    with Crew(chosen, _simulated, min(jobs, len(setups))) as crew:
        simulated = crew.run([Task(spec=s, mode=question.mode) for s in setups], progress)
    together, *others = simulated
    best = max(others, key=_merit, default=together)
    if not _is_worth(best, together):
        best = together
    return Advice(
        question=question,
        simulated=tuple(simulated),
        best=best,
        together=together,
        because=tuple(_because(best, together, others, question, work, least)),
        work=work,
    )


def _work(requests: Sequence[TraceRequest], question: Question) -> dict[str, float]:
    model, count = question.model, question.instances
    seconds = requests[-1].arrival_s
    prompts = np.array([r.input_tokens for r in requests])
    outputs = np.array([r.output_tokens for r in requests])
    prefill_s = sum(model.prefill_s(int(n)) for n in prompts)
    per_10_s = np.bincount((np.array([r.arrival_s for r in requests]) / 10).astype(int), prompts)
    # The last chunk of a long prompt reads all of it.
    long = int(np.quantile(prompts, 0.99))
    chunk = min(model.step_tokens, long)
    return {
        "requests": float(len(requests)),
        "seconds": seconds,
        "requests_per_s": len(requests) / seconds if seconds else math.inf,
        "mean_prompt_tokens": float(prompts.mean()),
        "mean_output_tokens": float(outputs.mean()),
        "prefill_share": float(prefill_s / (max(seconds, 1.0) * count)),
        "peak_to_mean_prompt_tokens": float(per_10_s.max() / max(per_10_s.mean(), 1e-9)),
        "mixed_step_s": model.step_s(chunk, 1, long, chunk * long),
        "decode_step_s": model.step_s(1, 1, int(prompts.mean()), int(prompts.mean())),
    }


def _check_possible(requests: Sequence[TraceRequest], question: Question) -> Reach:
    """What any number of instances could do at best."""
    model = question.model
    slos = question.ttft_slo_s, question.tpot_slo_s
    least = reach([model], requests, *slos, ENOUGH_ATTAINED)
    held = (
        f"{_ENOUGH} of the requests, each alone on an instance, have at best {least}: ask for no "
        "less (--slo), or for other hardware"
    )
    shortest = min(r.input_tokens for r in requests)
    longest = max(r.input_tokens + r.output_tokens for r in requests)
    least_s = model.step_s(1, 1, shortest, shortest)
    if question.tpot_slo_s < least_s:
        raise ConfigError(
            f"nobody can hold a TPOT of {1e3 * question.tpot_slo_s:g} ms with {model.name}: one "
            f"sequence alone takes {1e3 * least_s:.1f} ms a token. {held}"
        )
    if question.ttft_slo_s < model.prefill_s(shortest):
        raise ConfigError(
            f"nobody can hold a TTFT of {question.ttft_slo_s:g} s with {model.name}: the shortest "
            f"prompt ({shortest} tokens) alone takes {model.prefill_s(shortest):.3f} s. {held}"
        )
    if longest > model.kv_tokens:
        raise ConfigError(
            f"{model.name} has room for {model.kv_tokens} tokens of KV, and one request of the "
            f"trace needs {longest}"
        )
    return least


def _setups(question: Question) -> list[ClusterSpec]:
    model, count = question.model, question.instances
    together = ClusterSpec(
        name="advise",
        pools=(
            PoolSpec(
                count=count,
                hardware=question.hardware,
                max_num_batched_tokens=model.step_tokens,
                max_num_seqs=model.max_running,
                max_model_len=model.kv_tokens,
            ),
        ),
        pd="off",
        ttft_slo_s=question.ttft_slo_s,
        tpot_slo_s=question.tpot_slo_s,
        link=LinkSpec(kv_gbit=question.link_gbit),
    )
    apart = [f"{prefill}:{count - prefill}" for prefill in range(1, count)]
    if count > 1:
        apart.append("auto")
    return [together, *(replace(together, pd=pd) for pd in apart)]


def _simulated(outcome: Outcome, task: Task) -> Simulated:
    spec = outcome.spec
    assert spec.ttft_slo_s is not None and spec.tpot_slo_s is not None
    ttft_s, tpot_s = outcome.ttft_s, outcome.tpot_s
    end_s = max(float(np.nanmax(outcome.end_s)), 1.0)
    return Simulated(
        setup="together" if spec.pd == "off" else spec.pd,
        ttft_s=ttft_s[~np.isnan(ttft_s)],
        tpot_s=tpot_s[~np.isnan(tpot_s)],
        gap_p99_s=outcome.gaps.quantile(0.99),
        attained=float(outcome.attained(spec.ttft_slo_s, spec.tpot_slo_s).mean()),
        held_s=outcome.held_s(ENOUGH_ATTAINED),
        num_split=outcome.handovers,
        role_changes=sum(change.at_s >= 0 for change in outcome.role_changes),
        utilisation=float(outcome.busy_s.mean()) / end_s,
    )


def _merit(outcome: Simulated) -> tuple[float, float]:
    return round(outcome.attained / WORTH_ATTAINED), -outcome.gap_p99_s


def _is_worth(best: Simulated, together: Simulated) -> bool:
    more = best.attained - together.attained
    if more >= WORTH_ATTAINED:
        return True
    return more > -WORTH_ATTAINED and best.gap_p99_s * WORTH_GAP <= together.gap_p99_s


def _because(
    best: Simulated,
    together: Simulated,
    others: Sequence[Simulated],
    question: Question,
    work: dict[str, float],
    least: Reach,
) -> list[str]:
    mixed_ms, slo_ms = 1e3 * work["mixed_step_s"], 1e3 * question.tpot_slo_s
    said = [
        f"a step with a chunk of a long prompt takes up to {mixed_ms:.1f} ms, "
        f"{'more' if mixed_ms > slo_ms else 'less'} than the {slo_ms:g} ms that a token may take",
        f"prompts are {100 * work['prefill_share']:.0f}% of what the instances can compute, in "
        f"peaks {work['peak_to_mean_prompt_tokens']:.1f} times the mean of 10 s",
    ]
    if best is together:
        if others:
            rival = max(others, key=_merit)
            said.append(
                f"the best split, {rival.setup}, keeps {100 * rival.attained:.1f}% within "
                f"the SLOs, against {100 * together.attained:.1f}% together: not worth moving KV"
            )
    else:
        said.append(
            f"{best.setup} keeps {100 * best.attained:.1f}% within the SLOs, against "
            f"{100 * together.attained:.1f}% together; the 99th percentile of gaps between tokens "
            f"is {1e3 * best.gap_p99_s:.1f} ms, against {1e3 * together.gap_p99_s:.1f} ms"
        )
    if best.attained < ENOUGH_ATTAINED:
        said += _what_would_do(best, question, least)
    return said


def _what_would_do(best: Simulated, question: Question, least: Reach) -> list[str]:
    """Where the best keeps too few."""
    if least.share < ENOUGH_ATTAINED:
        first = (
            f"no number of instances keeps {_ENOUGH} of the requests within the SLOs: with each "
            f"alone on one, {_ENOUGH} have at best {least}. It takes other hardware or looser SLOs"
        )
    else:
        first = (
            f"no setup of {question.instances} keeps {_ENOUGH} of the requests within the SLOs: it "
            "takes more instances, faster ones, or looser SLOs"
        )
    ttft, tpot = (ms(s) if math.isfinite(s) else "none at all" for s in best.held_s)
    held = f"{_ENOUGH} had a TTFT of up to {ttft}, and {_ENOUGH} a TPOT of up to {tpot}"
    setup = "everything together" if best.setup == "together" else best.setup
    return [first, f"with {setup}, {held}"]


def as_dict(advice: Advice) -> dict[str, Any]:
    """For programs."""

    def row(outcome: Simulated) -> dict[str, Any]:
        def at(seconds: np.ndarray, share: float) -> float:
            return float(np.quantile(seconds, share)) if len(seconds) else 0.0

        held_s = (s if math.isfinite(s) else None for s in outcome.held_s)
        return {
            "setup": outcome.setup,
            "attained": outcome.attained,
            "ttft_p50_s": at(outcome.ttft_s, 0.5),
            "ttft_p99_s": at(outcome.ttft_s, 0.99),
            "tpot_p50_s": at(outcome.tpot_s, 0.5),
            "tpot_p99_s": at(outcome.tpot_s, 0.99),
            "gap_p99_s": outcome.gap_p99_s,
            "held": {"share": ENOUGH_ATTAINED} | dict(zip(("ttft_s", "tpot_s"), held_s)),
            "split_requests": outcome.num_split,
            "role_changes": outcome.role_changes,
            "utilisation": outcome.utilisation,
        }

    question = advice.question
    return {
        "advice": advice.best.setup,
        "disaggregate": advice.splits,
        "because": list(advice.because),
        "setups": [row(outcome) for outcome in advice.simulated],
        "work": {name: x if math.isfinite(x) else None for name, x in advice.work.items()},
        "instances": question.instances,
        "model_cost": question.model.name,
        "slo": {"ttft_s": question.ttft_slo_s, "tpot_s": question.tpot_slo_s},
    }
