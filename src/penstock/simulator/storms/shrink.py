"""A failing storm made smaller for as long as it fails in the same way.

Faults and requests are left out by delta debugging (Zeller and Hildebrandt, "Simplifying and
Isolating Failure-Inducing Input", IEEE TSE 2002); then what is left is made plainer, one field
after the other. A storm is data, so nothing else changes when a part of it goes; but every draw of
the network after it does, which is why a smaller storm has to be played and not argued about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, TypeVar

from penstock.simulator.storms.play import Verdict
from penstock.simulator.storms.storm import REGISTRY, Ask, Fault, ScaleUp, Shape, Storm

T = TypeVar("T")
Play = Callable[[Storm], Verdict]


@dataclass
class Shrinker:
    """`play` is asked at most `most_plays` times."""

    play: Play
    most_plays: int = 600
    num_plays: int = 0

    def shrink(self, failed: Verdict) -> Verdict:
        """`failed`: of the storm to begin with. Returns that of the smallest one found."""
        best = failed
        while self.num_plays < self.most_plays:
            before = best
            best = self._fewer(best, "faults")
            best = self._fewer(best, "asks")
            best = self._plainer(best)
            if best.storm == before.storm:
                break
        return best

    def _fails(self, best: Verdict, storm: Storm) -> Verdict | None:
        """The verdict on `storm`, if it fails as `best` did."""
        if self.num_plays >= self.most_plays:
            return None
        self.num_plays += 1
        verdict = self.play(storm)
        same = verdict.where == best.where and verdict.words == best.words
        return verdict if verdict.failure and same else None

    def _fewer(self, best: Verdict, what: str) -> Verdict:
        """Delta debugging over one list."""
        parts = 2
        while items := getattr(best.storm, what):
            for fewer in _complements(items, min(parts, len(items))):
                found = self._fails(best, _replaced(best.storm, what, tuple(fewer)))
                if found is not None:
                    best, parts = found, max(parts - 1, 2)
                    break
            else:
                if parts >= len(items):
                    break
                parts *= 2
        return best

    def _plainer(self, best: Verdict) -> Verdict:
        """Each change that is possible, once."""
        tried: set[Storm] = set()  # only asked
        again = True
        while again:
            again = False
            for storm in _plainer_storms(best.storm):
                if storm in tried:
                    continue
                tried.add(storm)
                found = self._fails(best, storm)
                if found is not None:
                    best, again = found, True
                    break
        return best


def _complements(items: Sequence[T], parts: int) -> Iterator[list[T]]:
    """All but one of `parts` parts, for each."""
    bounds = [len(items) * number // parts for number in range(parts + 1)]
    for begin, end in pairwise(bounds):
        yield [*items[:begin], *items[end:]]


# --- plainer -------------------------------------------------------------------------------------


def _plainer_storms(storm: Storm) -> Iterator[Storm]:
    for shape in _plainer_shapes(storm.shape):
        if all(_knows(shape, part) for part in (*storm.asks, *storm.faults)):
            yield replace(storm, shape=shape)
    for number, ask in enumerate(storm.asks):
        for plain in _plainer_asks(ask):
            yield replace(storm, asks=_with(storm.asks, number, plain))
    for number, fault in enumerate(storm.faults):
        for changed in _plainer_faults(fault):
            yield replace(storm, faults=_with(storm.faults, number, changed))


def _with(items: tuple[T, ...], number: int, item: T) -> tuple[T, ...]:
    return (*items[:number], item, *items[number + 1 :])


def _knows(shape: Shape, part: Ask | Fault) -> bool:
    """Everybody that is named is there (or is to come)."""
    if isinstance(part, Ask):
        return part.service in shape.services
    names: set[str] = set()  # only compared
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name in ("node", "service"):
            names.add(value)
        elif field.name in ("these", "those"):
            names.update(value)
    here = names <= {*shape.instances, *shape.services, REGISTRY}
    return here or isinstance(part, ScaleUp)


def _plainer_shapes(shape: Shape) -> Iterator[Shape]:
    if shape.num_instances > 1:
        yield replace(shape, num_instances=shape.num_instances - 1)
    if shape.num_services > 1:
        yield replace(shape, num_services=1)
    plain = Shape()
    for name in (
        "pd", "registry", "policy", "host_blocks", "disk_blocks", "num_windows", "means",
        "num_hosts", "job_fails", "job_hangs", "block_spoilt", "credit_window", "num_blocks",
        "max_num_seqs", "max_num_batched_tokens", "max_waiting", "max_queue", "max_run_steps",
        "latency_s", "enable_prefix_caching", "max_chunk_tokens", "ttft_slo_s",
        "tpot_slo_s", "refuses_late", "judged_after", "store", "index_blocks",
    ):  # fmt: skip
        if getattr(shape, name) != getattr(plain, name):
            yield _replaced(shape, name, getattr(plain, name))
    if shape.means != ():
        yield replace(shape, means=())


def _plainer_asks(ask: Ask) -> Iterator[Ask]:
    for name, value in (
        ("n", 1),
        ("cancel_after_s", None),
        ("budget_s", None),
        ("request_class", "online"),
        ("ttft_slo_s", None),
        ("priority", 0),
        ("salt", ""),
        ("shared_tokens", 0),
        ("own_tokens", min(16, ask.own_tokens)),
        ("max_tokens", min(2, ask.max_tokens)),
        ("max_tokens", -(-ask.max_tokens // 2)),
        ("at_s", round(ask.at_s, 1)),
        ("at_s", round(ask.at_s, 2)),
    ):
        if getattr(ask, name) != value:
            yield _replaced(ask, name, value)


def _plainer_faults(fault: Fault) -> Iterator[Fault]:
    for field in fields(fault):
        value = getattr(fault, field.name)
        if field.name in ("loss", "duplicate", "jitter_s", "reorder", "jump_s", "drift") and value:
            yield _replaced(fault, field.name, 0.0)
        elif field.name == "factor" and value > 2.0:
            yield _replaced(fault, field.name, 2.0)
        elif field.name == "count" and value > 1:
            yield _replaced(fault, field.name, value - 1)
            yield _replaced(fault, field.name, 1)
        elif field.name == "late_s" and value != field.default:
            yield _replaced(fault, field.name, field.default)
        elif field.name in ("noticed", "words_arrive", "one_way", "out") and value:
            yield _replaced(fault, field.name, False)
        elif field.name in ("at_s", "for_s", "again_after_s") and value is not None:
            for digits in (0, 1, 2):
                if value != round(value, digits):
                    yield _replaced(fault, field.name, round(value, digits))
        elif field.name in ("these", "those") and len(value) > 1:
            for name in value:
                yield _replaced(fault, field.name, tuple(v for v in value if v != name))


def _replaced(item: Any, name: str, value: object) -> Any:
    return replace(item, **{name: value})
