"""Is prefill apart from decode better for this trace, on these instances, for these SLOs?

Each setup (all instances doing both, every fixed split, and roles that follow the work) replays the
same stretch of the trace under the production policies; what is advised is what keeps the most
requests within the SLOs, and the simpler setup where that makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penstock.loadgen.costs import InstanceModel
from penstock.loadgen.replay import Replay, Replayed, Setup
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import ConfigError
from penstock.protocol.instance import Role
from penstock.service.policies.view import TransferCosts

#: A setup has to keep this much more of the requests within the SLOs to be worth its trouble; or
#: shorten the 99th percentile of gaps between tokens by this factor.
WORTH_ATTAINED = 0.01
WORTH_GAP = 1.5
#: Below this nobody is served well: the advice is about more instances then.
ENOUGH_ATTAINED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    model: InstanceModel
    instances: int
    ttft_slo_s: float
    tpot_slo_s: float
    #: What blocks travel over between two instances, in bytes a second.
    link_bytes_per_s: float
    #: The busiest stretch of so many seconds is replayed; None: all of it.
    window_s: float | None = None
    #: The trace comes so many times as fast.
    rate: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    question: Question
    replayed: tuple[Replayed, ...]
    best: Replayed
    together: Replayed
    #: Sentences, with the numbers that decided.
    because: tuple[str, ...]
    work: dict[str, float]

    @property
    def splits(self) -> bool:
        return self.best is not self.together


def advise(
    requests: Sequence[TraceRequest],
    question: Question,
    progress: Callable[[str], None] = lambda name: None,
) -> Advice:
    """Raises `ConfigError` where no setup could ever keep the SLOs."""
    chosen = _busiest(requests, question)
    work = _work(chosen, question)
    _check_possible(chosen, question)
    replayed = []
    for setup in _setups(question):
        progress(setup.name)
        replayed.append(Replay(question.model, setup).run(chosen))
    together, *others = replayed
    best = max(others, key=_merit, default=together)
    if not _is_worth(best, together):
        best = together
    return Advice(
        question=question,
        replayed=tuple(replayed),
        best=best,
        together=together,
        because=tuple(_because(best, together, others, question, work)),
        work=work,
    )


def _busiest(requests: Sequence[TraceRequest], question: Question) -> list[TraceRequest]:
    """The stretch with the most prompt and output tokens, beginning at 0 s."""
    scaled = [replace(r, arrival_s=r.arrival_s / question.rate) for r in requests]
    if question.window_s is None or scaled[-1].arrival_s <= question.window_s:
        return scaled
    times = np.array([r.arrival_s for r in scaled])
    tokens = np.cumsum([0] + [r.input_tokens + r.output_tokens for r in scaled])
    ends = np.searchsorted(times, times + question.window_s)
    first = int((tokens[ends] - tokens[: len(times)]).argmax())
    start_s = scaled[first].arrival_s
    return [replace(r, arrival_s=r.arrival_s - start_s) for r in scaled[first : ends[first]]]


def _work(requests: Sequence[TraceRequest], question: Question) -> dict[str, float]:
    model, count = question.model, question.instances
    seconds = max(requests[-1].arrival_s, 1.0)
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
        "requests_per_s": len(requests) / seconds,
        "mean_prompt_tokens": float(prompts.mean()),
        "mean_output_tokens": float(outputs.mean()),
        "prefill_share": float(prefill_s / (seconds * count)),
        "peak_to_mean_prompt_tokens": float(per_10_s.max() / max(per_10_s.mean(), 1e-9)),
        "mixed_step_s": model.step_s(chunk, 1, long, chunk * long),
        "decode_step_s": model.step_s(1, 1, int(prompts.mean()), int(prompts.mean())),
    }


def _check_possible(requests: Sequence[TraceRequest], question: Question) -> None:
    model = question.model
    shortest, longest = (f(r.input_tokens for r in requests) for f in (min, max))
    least_s = model.step_s(1, 1, shortest, shortest)
    if question.tpot_slo_s < least_s:
        raise ConfigError(
            f"nobody can hold a TPOT of {1e3 * question.tpot_slo_s:g} ms with {model.name}: one "
            f"sequence alone takes {1e3 * least_s:.1f} ms a token"
        )
    if question.ttft_slo_s < model.prefill_s(shortest):
        raise ConfigError(
            f"nobody can hold a TTFT of {question.ttft_slo_s:g} s with {model.name}: the shortest "
            f"prompt ({shortest} tokens) alone takes {model.prefill_s(shortest):.3f} s"
        )
    if longest + max(r.output_tokens for r in requests) > model.kv_tokens:
        raise ConfigError(
            f"{model.name} has room for {model.kv_tokens} tokens of KV, and one request of the "
            f"trace needs {longest} and more"
        )


def _setups(question: Question) -> list[Setup]:
    count, model = question.instances, question.model
    transfer = TransferCosts(
        copy_s=2e-3, copy_token_s=model.kv_bytes_per_token / question.link_bytes_per_s
    )

    def setup(name: str, roles: list[Role], adaptive: bool = False) -> Setup:
        return Setup(
            name=name,
            roles=tuple(roles),
            adaptive=adaptive,
            ttft_slo_s=question.ttft_slo_s,
            tpot_slo_s=question.tpot_slo_s,
            transfer=transfer,
        )

    alike: list[Role] = ["any"] * count
    setups = [setup("together", alike)]
    for prefill in range(1, count):
        roles: list[Role] = ["decode"] * count
        roles[:prefill] = ["prefill"] * prefill
        setups.append(setup(f"{prefill}:{count - prefill}", roles))
    if count > 1:
        setups.append(setup("auto", alike, adaptive=True))
    return setups


def _merit(outcome: Replayed) -> tuple[float, float]:
    return round(outcome.attained / WORTH_ATTAINED), -outcome.gap_p99_s


def _is_worth(best: Replayed, together: Replayed) -> bool:
    more = best.attained - together.attained
    if more >= WORTH_ATTAINED:
        return True
    return more > -WORTH_ATTAINED and best.gap_p99_s * WORTH_GAP <= together.gap_p99_s


def _because(
    best: Replayed,
    together: Replayed,
    others: Sequence[Replayed],
    question: Question,
    work: dict[str, float],
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
                f"the best split, {rival.setup.name}, keeps {100 * rival.attained:.1f}% within "
                f"the SLOs, against {100 * together.attained:.1f}% together: not worth moving KV"
            )
    else:
        said.append(
            f"{best.setup.name} keeps {100 * best.attained:.1f}% within the SLOs, against "
            f"{100 * together.attained:.1f}% together; the 99th percentile of gaps between tokens "
            f"is {1e3 * best.gap_p99_s:.1f} ms, against {1e3 * together.gap_p99_s:.1f} ms"
        )
    if best.attained < ENOUGH_ATTAINED:
        said.append(
            f"no setup of {question.instances} keeps {100 * ENOUGH_ATTAINED:.0f}% of the requests "
            "within the SLOs: it takes more instances, faster ones, or looser SLOs"
        )
    return said


def as_dict(advice: Advice) -> dict[str, Any]:
    """For programs."""

    def row(outcome: Replayed) -> dict[str, Any]:
        def at(seconds: np.ndarray, share: float) -> float:
            return float(np.quantile(seconds, share)) if len(seconds) else 0.0

        return {
            "setup": outcome.setup.name,
            "attained": outcome.attained,
            "ttft_p50_s": at(outcome.ttft_s, 0.5),
            "ttft_p99_s": at(outcome.ttft_s, 0.99),
            "tpot_p50_s": at(outcome.tpot_s, 0.5),
            "tpot_p99_s": at(outcome.tpot_s, 0.99),
            "gap_p99_s": outcome.gap_p99_s,
            "split_requests": outcome.num_split,
            "role_changes": outcome.role_changes,
            "utilisation": outcome.busy_s / (outcome.seconds * len(outcome.setup.roles)),
        }

    question = advice.question
    return {
        "advice": advice.best.setup.name,
        "disaggregate": advice.splits,
        "because": list(advice.because),
        "setups": [row(outcome) for outcome in advice.replayed],
        "work": advice.work,
        "instances": question.instances,
        "model_cost": question.model.name,
        "slo": {"ttft_s": question.ttft_slo_s, "tpot_s": question.tpot_slo_s},
    }
