"""How far off are the cost models? `python -m benchmarks.cost_models [--json FILE]`

Three questions, each answered with points that the coefficients in question have not seen:

* what does the form lose: the step times it was fitted to, by phase; and what separate coefficients
  for decode and for prompts would gain;
* how far does it carry: every batch size, prompt length and TP left out in turn;
* and what does all of that say about engines that were measured end to end (574 runs of vLLM,
  SGLang and TensorRT-LLM that nothing was fitted to): each is run in the simulator as it was
  measured, so many requests at once, a new one as soon as one has ended. What is not said of the
  runs is how they began, and that decides TTFT: where all begin together and are of one length,
  they end together, and prompts come in waves for ever; where they are spread, one comes at a time.
  So both are simulated.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tools import fit_costs
from tools.fit_costs import Name, Point

from penstock.loadgen.prompts import prompt_ids
from penstock.loadgen.traces import TraceRequest
from penstock.protocol.errors import PenstockError
from penstock.protocol.request import SamplingParams
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.simulator.build import SERVICE, build
from penstock.simulator.experiment import MODES
from penstock.simulator.spec import ClusterSpec, PoolSpec
from penstock.simulator.world import World

DATA = Path(__file__).parents[1] / "tests" / "data"
STEP_TIMES, END_TO_END = DATA / "gpu_step_times.csv.gz", DATA / "gpu_end_to_end.csv.gz"
Row = dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.cost_models", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the runs, each Nth")
    parser.add_argument(
        "--most-tokens", type=int, default=66_000, metavar="N",
        help="leave out runs with more output tokens at once (66000)",
    )  # fmt: skip
    options = parser.parse_args()
    measured = fit_costs.read(STEP_TIMES)
    found = {
        "form": form(measured),
        "left_out": left_out(measured),
        "end_to_end": end_to_end(options.every, options.most_tokens),
    }
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


# --- the form ------------------------------------------------------------------------------------


def relative_errors(coefficients: np.ndarray, points: list[Point]) -> np.ndarray:
    errors: np.ndarray = fit_costs.predict(coefficients, points) / fit_costs.seconds_of(points) - 1
    return errors


def form(measured: dict[Name, list[Point]]) -> dict[str, dict[str, Any]]:
    """By phase: errors with one set of coefficients, and with one each for decode and prompts."""
    together: dict[str, list[float]] = defaultdict(list)
    apart: dict[str, list[float]] = defaultdict(list)
    for points in measured.values():
        one = fit_costs.fit(points)
        decodes = [p for p in points if p.phase == "decode"]
        prompts = [p for p in points if p.phase != "decode"]
        for chosen in (decodes, prompts):
            own = fit_costs.fit(chosen)
            for p, error, own_error in zip(
                chosen, relative_errors(one, chosen), relative_errors(own, chosen)
            ):
                together[p.phase].append(error)
                apart[p.phase].append(own_error)
    return {
        phase: {"together": summary(together[phase]), "apart": summary(apart[phase])}
        for phase in fit_costs.PHASES
    }


def summary(errors: Iterable[float]) -> dict[str, Any]:
    """Of relative errors: of their sizes the median, mean and 90th percentile; and the bias."""
    errors = np.array(list(errors))
    sizes = np.abs(errors)
    return {
        "points": len(errors),
        "median": round(float(np.median(sizes)), 4),
        "mean": round(float(sizes.mean()), 4),
        "p90": round(float(np.quantile(sizes, 0.9)), 4),
        "bias": round(float(np.median(errors)), 4),
    }


def left_out(measured: dict[Name, list[Point]]) -> dict[str, dict[str, Any]]:
    """Errors on what a fit has not seen."""
    return {
        "a batch size": _leave_one(measured, "decode", lambda p: p.batch),
        "a context length of decode": _leave_one(measured, "decode", lambda p: p.context),
        "a prompt length": _leave_one(measured, "prefill", lambda p: p.new_tokens),
        "a length of cached prefixes": _leave_one(measured, "chunk", lambda p: p.context),
        "all contexts beyond 16k": _leave_one(measured, "far chunk", lambda p: 0),
        **{f"TP {tp}": _leave_tp(measured, tp) for tp in (1, 2, 4, 8)},
    }


def _leave_one(
    measured: dict[Name, list[Point]], phase: str, group: Callable[[Point], int]
) -> dict[str, Any]:
    errors: list[float] = []
    for points in measured.values():
        for value in sorted({group(p) for p in points if p.phase == phase}):
            out = [p for p in points if p.phase == phase and group(p) == value]
            seen = [p for p in points if p.phase != phase or group(p) != value]
            errors += relative_errors(fit_costs.fit(seen), out).tolist()
    return summary(errors)


def _leave_tp(measured: dict[Name, list[Point]], tp: int) -> dict[str, Any]:
    """Each coefficient as a part that is shared out among the GPUs and one that is not, fitted to
    the other TPs of the same GPU, model and dtype; where there are two of them at least."""
    errors: list[float] = []
    for name, out in measured.items():
        if name.tp != tp:
            continue
        others = {n: p for n, p in measured.items() if n[:3] == name[:3] and n.tp != tp}
        if len(others) >= 2:
            errors += relative_errors(across_tp(others, tp), out).tolist()
    return summary(errors)


def across_tp(measured: dict[Name, list[Point]], tp: int) -> np.ndarray:
    """Coefficients for `tp`, from step times with other TPs."""
    features, wanted = [], []
    for name, points in measured.items():
        counts = {phase: sum(p.phase == phase for p in points) for phase in fit_costs.PHASES}
        for p in points:
            weight = counts[p.phase] ** -0.5
            terms = np.array(p.features) * weight / p.seconds
            features.append(np.concatenate([terms, terms / name.tp]))
            wanted.append(weight)
    both = fit_costs.non_negative(np.array(features), np.array(wanted))
    whole, shared = both[: len(both) // 2], both[len(both) // 2 :]
    coefficients: np.ndarray = whole + shared / tp
    return coefficients


# --- end to end ----------------------------------------------------------------------------------

#: All requests of a run are so many times those at once.
WAVES = 3
#: What the three engines compute in one step on such GPUs unless told otherwise.
STEP_TOKENS = 8192


@dataclass
class ClosedLoop:
    """So many requests at once, a new one for each that has ended."""

    world: World
    prompt_tokens: int
    output_tokens: int
    at_once: int
    #: Over how long the first ones come; what they see does not count then.
    spread_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    _made: int = 0

    @property
    def total(self) -> int:
        return WAVES * self.at_once

    def begin(self) -> None:
        if self._made == self.total:
            return
        number, self._made = self._made, self._made + 1
        request = TraceRequest(0.0, self.prompt_tokens, self.output_tokens)
        sampling = SamplingParams(max_tokens=self.output_tokens, ignore_eos=True, seed=number)
        spec = GenerationSpec(str(number), prompt_ids(request, number), sampling, ttft_slo_s=None)
        counts = not self.spread_s or number >= self.at_once
        self.world.submit_now(SERVICE, spec, _Client(self, self.world.now, counts))

    def run(self) -> tuple[float, float]:
        """Mean TTFT and TPOT in seconds."""
        self.world.run(3.0)  # instances attach
        for number in range(self.at_once):
            self.world.at(self.world.now + self.spread_s * number / self.at_once, self.begin)
        uncounted = self.at_once if self.spread_s else 0
        while len(self.ttft_s) < self.total - uncounted:
            self.world.run(self.world.now + 1.0)
        return float(np.mean(self.ttft_s)), float(np.mean(self.tpot_s))


@dataclass
class _Client:
    loop: ClosedLoop
    asked_s: float
    counts: bool
    first_s: float | None = None

    def take(self, delta: TokenDelta) -> None:
        now_s = self.loop.world.now
        if delta.ids and self.first_s is None:
            self.first_s = now_s
        if delta.finish is not None:
            assert delta.finish == "length" and self.first_s is not None, delta
            if self.counts:
                self.loop.ttft_s.append(self.first_s - self.asked_s)
                self.loop.tpot_s.append((now_s - self.first_s) / (self.loop.output_tokens - 1))
            self.loop.begin()

    def refused(self, error: PenstockError) -> None:
        raise error


def kv_dtype(row: Row) -> str | None:
    """What the KV of a measured run was in, which is not said: bfloat16 if all of its requests fit
    then, else fp8 if they do. None: neither."""
    tp = int(row["tp"] or row["decode_tp"])
    room = fit_costs.kv_tokens(row["gpu"], row["model"], row["gemm_dtype"], tp)
    needed = int(row["batch"] or row["decode_batch"]) * (int(row["isl"]) + int(row["osl"]))
    if needed <= room:
        return "bfloat16"
    return "fp8" if needed <= 2 * room else None


def cluster_of(row: Row) -> ClusterSpec:
    """What was measured."""

    def pool(count: int, tp: int, **more: Any) -> PoolSpec:
        name = Name(row["gpu"], row["model"], row["gemm_dtype"], tp)
        kv_tokens = fit_costs.kv_tokens(*name) * (2 if kv_dtype(row) == "fp8" else 1)
        return PoolSpec(
            count=count, hardware=str(name), kv_tokens=kv_tokens, max_num_seqs=1024,
            max_num_batched_tokens=STEP_TOKENS, **more,
        )  # fmt: skip

    if row["mode"] == "agg":
        pools = (pool(1, int(row["tp"])),)
        return ClusterSpec(pools=pools, policy="least-load", pd="off")
    prefill = pool(
        int(row["prefill_workers"]), int(row["prefill_tp"]), name="prefill", role="prefill"
    )
    workers = int(row["decode_workers"])
    decode = pool(workers, int(row["decode_tp"]), name="decode", role="decode")
    return ClusterSpec(pools=(prefill, decode), policy="split", pd="pools")


def simulate(row: Row) -> dict[str, float]:
    """Mean times in ms, begun together and spread."""
    prompt, output, at_once = int(row["isl"]), int(row["osl"]), _at_once(row)

    def loop(spread_s: float) -> ClosedLoop:
        world = build(cluster_of(row), 0, MODES["scale"]).world
        return ClosedLoop(world, prompt, output, at_once, spread_s)

    ttft_s, tpot_s = loop(0.0).run()
    spread_ttft_s, spread_tpot_s = loop(ttft_s + tpot_s * (output - 1)).run()
    return {
        "together_ttft_ms": 1e3 * ttft_s,
        "together_tpot_ms": 1e3 * tpot_s,
        "spread_ttft_ms": 1e3 * spread_ttft_s,
        "spread_tpot_ms": 1e3 * spread_tpot_s,
    }


def end_to_end(every: int, most_tokens: int) -> dict[str, Any]:
    with gzip.open(END_TO_END, "rt") as file:
        rows = list(csv.DictReader(file))
    known = set(fit_costs.read(STEP_TIMES))
    chosen = [
        row
        for row in rows[::every]
        if _names(row) <= known
        and kv_dtype(row) is not None
        and _at_once(row) * int(row["osl"]) <= most_tokens
    ]
    points = []
    for number, row in enumerate(chosen):
        simulated = {name: round(ms, 3) for name, ms in simulate(row).items()}
        about = {k: v for k, v in row.items() if v} | {"kv_dtype": kv_dtype(row)}
        points.append(about | simulated)
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {len(chosen)} runs", end="", file=sys.stderr, flush=True)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for point in points:
        gpu = point["gpu"].removesuffix("_sxm")
        name = f"{gpu} {point['model']} {point['gemm_dtype']} {point['mode']} {point['backend']}"
        groups[name].append(point)
        groups[f"all {point['mode']}"].append(point)
    return {
        "runs": len(chosen),
        "share_with_ttft_between_spread_and_together": round(
            float(np.mean([_is_between(point) for point in points])), 3
        ),
        "left_out_as_too_long_or_unknown": len(rows[::every]) - len(chosen),
        "step_tokens": STEP_TOKENS,
        "groups": {name: _errors(groups[name]) for name in sorted(groups)},
        "points": points,
    }


def _is_between(point: dict[str, Any]) -> bool:
    """Whether the measured TTFT is; a tenth of it beyond either is let pass."""
    measured = float(point["ttft_ms"])
    return 0.9 * point["spread_ttft_ms"] <= measured <= 1.1 * point["together_ttft_ms"]


def _names(row: Row) -> set[Name]:
    """Of the instances' cost models."""
    tps = [int(row[k]) for k in ("tp", "prefill_tp", "decode_tp") if row[k]]
    return {Name(row["gpu"], row["model"], row["gemm_dtype"], tp) for tp in tps}


def _at_once(row: Row) -> int:
    return int(row["batch"] or 0) or int(row["decode_batch"]) * int(row["decode_workers"])


def _errors(points: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{begun}_{what}": summary(
            p[f"{begun}_{what}_ms"] / float(p[f"{what}_ms"]) - 1 for p in points
        )
        for begun in ("together", "spread")
        for what in ("ttft", "tpot")
    }


# --- words ---------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    head = f"{'':<46}{'points':>7}{'median':>8}{'mean':>7}{'p90':>7}{'bias':>7}"

    def line(name: str, s: dict[str, Any]) -> str:
        shares = "".join(f"{100 * s[k]:>{w}.1f}" for k, w in
                         (("median", 8), ("mean", 7), ("p90", 7), ("bias", 7)))  # fmt: skip
        return f"{name:<46}{s['points']:>7}{shares}"

    lines = ["errors in % of the time", "", head]
    for phase, both in found["form"].items():
        lines.append(line(f"fitted, {phase}", both["together"]))
        lines.append(line(f"  with coefficients of its own, {phase}", both["apart"]))
    lines += ["", head]
    lines += [line(f"left out: {name}", s) for name, s in found["left_out"].items()]
    for what in ("together_ttft", "spread_ttft", "together_tpot", "spread_tpot"):
        title = f"{what[-4:].upper()}, begun {what[:-5]}"
        lines += ["", title + head[len(title) :]]
        groups = found["end_to_end"]["groups"]
        lines += [line(name, errors[what]) for name, errors in groups.items()]
    e2e = found["end_to_end"]
    between = 100 * e2e["share_with_ttft_between_spread_and_together"]
    lines += [
        "",
        f"{e2e['runs']} runs, {e2e['left_out_as_too_long_or_unknown']} left out; {between:.0f}% "
        "have a TTFT between the two ways to begin",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
