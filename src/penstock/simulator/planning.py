"""The search behind `penstock plan`: the cheapest cluster that keeps enough requests in their SLOs.

Pure: what a cluster attains, somebody else measures (`Search.wants`, `Search.take`). A *line* is
one kind of instance under one way of splitting prefill and decode; on each, the fewest instances
that do are found by doubling steps and bisection, since more instances of a kind serve no worse.
Those that may be cheapest are looked at first, and one whose least possible cost is beyond what
would still be of interest is left where it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from penstock.loadgen.costs import InstanceModel
from penstock.loadgen.traces import TraceRequest
from penstock.simulator.quantities import ms

#: off: together; auto: roles that follow the work; split: so many of each, for good.
Kind = Literal["off", "auto", "split"]
KINDS: tuple[Kind, ...] = ("off", "split", "auto")
#: Lines that cost so many times what the best does are of no interest.
INTEREST = 1.5
_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of instance. `least`: fewer cannot do, as a closed form says; `prefill_share`: of
    the work, what prompts are, for a first guess at a split."""

    hardware: str
    gpus: int
    gpu_hour: float
    least: int = 1
    prefill_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Candidate:
    """`pd` as in a cluster file: off, auto or P:D."""

    shape: Shape
    count: int
    pd: str

    @property
    def gpus(self) -> int:
        return self.count * self.shape.gpus

    @property
    def cost(self) -> float:
        """Of an hour, in whatever `gpu_hour` is in."""
        return self.gpus * self.shape.gpu_hour

    @property
    def kind(self) -> Kind:
        return "split" if ":" in self.pd else "off" if self.pd == "off" else "auto"

    @property
    def order(self) -> tuple[float, int, int, str]:
        """Cheapest first; of equals, the one with the least machinery."""
        return self.cost, KINDS.index(self.kind), self.count, self.shape.hardware + self.pd


Attained = Mapping[Candidate, float]


def least_instances(
    model: InstanceModel, requests: Sequence[TraceRequest], ttft_s: float, tpot_s: float,
    wanted: float,
) -> int:  # fmt: skip
    """Fewer instances cannot keep `wanted` of the requests in their SLOs: the least work of so many
    requests takes longer than there is time for it.

    A token costs at least its own terms, and its part of a step that is as full as steps get. What
    is shared between requests (prefixes) costs nothing here.
    """
    c = model.cost
    step_share_s = c.base_s / model.step_tokens
    row_share_s = c.base_s / min(model.step_tokens, model.max_running)
    work_s, allowed_s = [], 0.0
    shared: set[int] = set()
    for r in requests:
        again = sum(h in shared for h in r.hash_ids) * r.block_tokens
        shared.update(r.hash_ids)
        prompt, output = max(r.input_tokens - again, 1), r.output_tokens - 1
        read = r.input_tokens + 0.5 * output
        work_s.append(
            prompt * (c.per_token_s + step_share_s + 0.5 * c.per_attention_s * prompt)
            + output * (c.per_token_s + c.per_row_s + row_share_s
                        + (c.per_context_token_s + c.per_attention_s) * read)
        )  # fmt: skip
        allowed_s = max(allowed_s, r.arrival_s + ttft_s + output * tpot_s)
    needed = math.ceil(wanted * len(work_s))
    least_s = float(np.sort(work_s)[:needed].sum())
    return max(math.ceil(least_s / allowed_s - 1e-9), 1)


def prefill_share(model: InstanceModel, requests: Sequence[TraceRequest], tpot_s: float) -> float:
    """Of the seconds that the requests take on instances that decode as many sequences at once as
    the TPOT allows, the share that prompts take."""
    prompts = np.array([r.input_tokens for r in requests], dtype=np.float64)
    outputs = np.array([r.output_tokens for r in requests], dtype=np.float64)
    mean = int(prompts.mean())
    prefill_s = len(requests) * model.prefill_s(max(mean, 1))
    context = prompts.mean() + 0.5 * outputs.mean()
    c = model.cost
    row_s = c.per_token_s + c.per_row_s + (c.per_context_token_s + c.per_attention_s) * context
    rows = np.clip((tpot_s - c.base_s) / max(row_s, 1e-12), 1, model.max_running)
    decode_s = outputs.sum() * (c.base_s / rows + row_s)
    return float(prefill_s / (prefill_s + decode_s))


@dataclass(frozen=True, slots=True)
class Reach:
    """What an instance could do with each request alone: `share` of them within both SLOs; the
    least TTFT and TPOT that the wanted share of them could be held to. A TTFT that caches of shared
    prefixes may shorten is not known (None)."""

    share: float
    ttft_s: float | None
    tpot_s: float

    def __str__(self) -> str:
        ttft = "" if self.ttft_s is None else f"TTFT {ms(self.ttft_s)} and "
        return f"{ttft}TPOT {ms(self.tpot_s)}"

    @property
    def order(self) -> tuple[float, float]:
        """The fastest first."""
        return self.ttft_s or 0.0, self.tpot_s


def reach(
    models: Sequence[InstanceModel], requests: Sequence[TraceRequest], ttft_s: float, tpot_s: float,
    wanted: float,
) -> Reach:  # fmt: skip
    """Of several models, each request has the best of each."""
    ttfts = np.min([_ttfts(model, requests) for model in models], axis=0)
    tpots = np.min([_tpots(model, requests) for model in models], axis=0)
    shares = any(r.hash_ids for r in requests)
    in_time = np.ones(len(ttfts), dtype=bool) if shares else ttfts <= ttft_s
    return Reach(
        float((in_time & (tpots <= tpot_s)).mean()),
        None if shares else float(np.quantile(ttfts, wanted, method="higher")),
        float(np.quantile(tpots, wanted, method="higher")),
    )


def _ttfts(model: InstanceModel, requests: Sequence[TraceRequest]) -> np.ndarray:
    prompts = [r.input_tokens for r in requests]
    first_s = {n: model.prefill_s(n) for n in set(prompts)}
    return np.array([first_s[n] for n in prompts])


def _tpots(model: InstanceModel, requests: Sequence[TraceRequest]) -> np.ndarray:
    """A request of one token has none: 0."""
    reads = np.array([r.input_tokens + 0.5 * r.output_tokens for r in requests])
    c = model.cost
    alone_s = c.base_s + c.per_token_s + c.per_row_s
    found = alone_s + (c.per_context_token_s + c.per_attention_s) * reads
    return np.where([r.output_tokens > 1 for r in requests], found, 0.0)


@dataclass(slots=True)
class _Line:
    shape: Shape
    kind: Kind
    most: int
    #: The same instances, doing both: about so many it will take.
    beside: _Line | None = None
    #: Counts up to here are known (or taken) to fail; `meets` does.
    fails: int = field(init=False)
    meets: Candidate | None = None
    #: What the present count has attained, by P of its splits.
    _tried: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fails = self._least - 1

    @property
    def _least(self) -> int:
        return max(self.shape.least, 1 if self.kind == "off" else 2)

    @property
    def done(self) -> bool:
        if self.meets is not None:
            return self.meets.count == self.fails + 1
        return self.fails >= self.most

    @property
    def least_cost(self) -> float:
        return (self.fails + 1) * self.shape.gpus * self.shape.gpu_hour

    @property
    def count(self) -> int:
        """Whose turn it is."""
        hint = self._hint
        if self.meets is not None:
            near = self.meets.count == hint
            return hint - 1 if near else (self.fails + self.meets.count) // 2
        if hint > self.fails:
            return hint
        begins = self.fails < self._least or self.fails == hint
        return min(self.fails + 1 if begins else math.ceil(self.fails * _GROWTH), self.most)

    @property
    def waits(self) -> bool:
        return self.beside is not None and not self.beside.done

    @property
    def _hint(self) -> int:
        """The count to begin with; 0: nothing is known."""
        if self.beside is None or not self.beside.done:
            return 0
        return self.most if self.beside.meets is None else self.beside.meets.count

    def wants(self) -> list[Candidate]:
        count = self.count
        if self.kind != "split":
            return [Candidate(self.shape, count, self.kind)]
        return [self._split(p, count) for p in self._untried(count)]

    def take(self, attained: Attained, wanted: float) -> None:
        count = self.count
        if self.kind != "split":
            asked = Candidate(self.shape, count, self.kind)
            self._settle(count, asked if attained[asked] >= wanted else None)
            return
        for prefill in self._untried(count):
            self._tried[prefill] = attained[self._split(prefill, count)]
        best = max(self._tried, key=lambda p: self._tried[p])
        if self._tried[best] >= wanted:
            self._settle(count, self._split(best, count))
        elif not self._untried(count):
            self._settle(count, None)

    def _untried(self, count: int) -> list[int]:
        """P's to look at: the guess, then the neighbours of the best so far, until none is better
        (of equals, the one that was tried first)."""
        if not self._tried:
            guess = round(self.shape.prefill_share * count)
            return [min(max(guess, 1), count - 1)]
        best = max(self._tried, key=lambda p: self._tried[p])
        near = [p for p in (best - 1, best + 1) if 1 <= p < count]
        return [p for p in near if p not in self._tried]

    def _split(self, prefill: int, count: int) -> Candidate:
        return Candidate(self.shape, count, f"{prefill}:{count - prefill}")

    def _settle(self, count: int, meets: Candidate | None) -> None:
        self._tried = {}
        if meets is None:
            self.fails = count
        else:
            self.meets = meets


class Search:
    """Ask `wants`, measure, `take`; until nothing is wanted. Then `found`."""

    def __init__(self, shapes: Sequence[Shape], wanted: float, max_gpus: int) -> None:
        self._wanted = wanted
        self._lines: list[_Line] = []
        for shape in shapes:
            most = max_gpus // shape.gpus
            together = _Line(shape, "off", most)
            apart = [_Line(shape, kind, most, together) for kind in KINDS if kind != "off"]
            self._lines += [together, *apart]
        #: All that was measured.
        self.attained: dict[Candidate, float] = {}

    def wants(self) -> list[Candidate]:
        """Candidates to measure next, each once; [] at the end."""
        while True:
            lines = self._open()
            asked = [c for line in lines for c in line.wants()]
            new = [c for c in dict.fromkeys(asked) if c not in self.attained]
            if new or not lines:
                return new
            for line in lines:  # all of it is known from before
                line.take(self.attained, self._wanted)

    def take(self, attained: Attained) -> None:
        self.attained.update(attained)
        for line in self._open():
            if all(c in self.attained for c in line.wants()):
                line.take(self.attained, self._wanted)

    def found(self) -> list[Candidate]:
        """The fewest instances of each line that are enough, cheapest first."""
        return sorted((x.meets for x in self._lines if x.meets is not None), key=lambda c: c.order)

    def nearest(self) -> Candidate | None:
        """Where nothing is enough: what attains the most."""
        best = max(self.attained.values(), default=0.0)
        return min(
            (c for c, share in self.attained.items() if share == best),
            key=lambda c: c.order,
            default=None,
        )

    def _open(self) -> list[_Line]:
        """Lines to go on with: the ones that may be cheapest first, and no others for now."""
        left = [line for line in self._lines if not line.done]
        best = min((c.cost for c in self.found()), default=math.inf)
        ready = [line for line in left if not line.waits]
        limit = INTEREST * min([best, *(line.least_cost for line in ready)])
        return [line for line in ready if line.least_cost <= limit] or [
            # What they wait for costs too much by now to be gone on with.
            line
            for line in left
            if line.least_cost <= INTEREST * best
        ]


def cheaper(candidate: Candidate, attained: Attained) -> tuple[Candidate, float] | None:
    """The best of its line with one instance less, and what it attained; None: none was tried. Of
    two, one is left, which does both."""
    count = candidate.count - 1
    kind = candidate.kind if count > 1 else "off"
    less = [
        (share, c)
        for c, share in attained.items()
        if (c.shape, c.kind, c.count) == (candidate.shape, kind, count)
    ]
    if not less:
        return None
    share, found = max(less, key=lambda x: x[0])
    return found, share


def larger(candidate: Candidate) -> Candidate:
    """One instance more, where the split has the most of its work."""
    count = candidate.count + 1
    if candidate.kind != "split":
        return Candidate(candidate.shape, count, candidate.pd)
    prefill, decode = (int(n) for n in candidate.pd.split(":"))
    if prefill / count < candidate.shape.prefill_share:
        return Candidate(candidate.shape, count, f"{prefill + 1}:{decode}")
    return Candidate(candidate.shape, count, f"{prefill}:{decode + 1}")
