"""An explanation for people: where a request went and why, and where its time was spent."""

from __future__ import annotations

from penstock.service.explain import (
    Explanation,
    PhaseSeconds,
    PlacementRecord,
    SequenceExplanation,
)


def in_words(explanation: Explanation) -> list[str]:
    several = len(explanation.choices) > 1
    lines: list[str] = []
    for choice in explanation.choices:
        prefix = f"choice {choice.choice}: " if several else ""
        lines += [prefix + line for line in _choice(choice)]
    return lines


def _choice(c: SequenceExplanation) -> list[str]:
    state = f"ended with {c.finish}" if c.finish else "still runs"
    lines = [f"{c.prompt_tokens} prompt tokens, {c.output_tokens} output tokens; {state}"]
    for placement in c.placements:
        lines += _placement(placement)
        if placement is c.placements[0] and c.placements_dropped:
            lines.append(f"({c.placements_dropped} further placements are not kept)")
    if c.ttft_s is not None:
        lines.append("first token after " + _against(c.ttft_s, c.predicted_ttft_s, c.ttft_slo_s))
    if c.tpot_s is not None:
        lines.append("then one every " + _against(c.tpot_s, c.predicted_tpot_s, c.tpot_slo_s))
    if c.cached_tokens is not None:
        said = (
            "" if c.predicted_cached_tokens is None else f", {c.predicted_cached_tokens} expected"
        )
        lines.append(f"{c.cached_tokens} prompt tokens were found in a cache{said}")
    lines.append(f"time: {_phases(c.phases)}")
    return lines


def _placement(p: PlacementRecord) -> list[str]:
    at = f" at {duration(p.at_s)}" if p.at_s >= 0.0005 else ""
    lines = [f"attempt {p.attempt} ({p.because}) went to {p.instance}{at}"]
    if p.decision is not None:
        lines.append(f"  {p.decision.policy}: {p.decision.reason}")
        lines += _ways(p)
        for other in p.decision.candidates:
            if other.instance != p.instance:
                lines.append(
                    f"  not {other.instance}: {duration(other.predicted_ttft_s)} predicted"
                )
    if p.fetched is not None and p.fetched.means:
        f = p.fetched
        lines.append(
            f"  {f.num_blocks} of {f.num_wanted} blocks came by {f.means} in {duration(f.seconds)}"
            + (f" ({f.reason})" if f.reason else "")
        )
    if p.end and p.end not in ("stop", "length"):
        lines.append(f"  it ended there: {p.end}")
    return lines


def _ways(p: PlacementRecord) -> list[str]:
    """What an interrupted sequence could have done on the chosen instance."""
    assert p.decision is not None
    here = next((c for c in p.decision.candidates if c.instance == p.instance), None)
    if p.way is None or here is None or not here.ways:
        return []
    said = [
        f"{way.kind}{f' from {way.source}' if way.source else ''} {duration(way.predicted_s)}"
        + (f" ({way.tokens} tokens)" if way.tokens else "")
        for way in here.ways
    ]
    lines = [f"  to go on there: {p.way}; predicted: {', '.join(said)}"]
    if p.actual_ttft_s is not None and p.predicted_ttft_s is not None:
        lines.append(
            f"  next token after {duration(p.actual_ttft_s)}, {duration(p.predicted_ttft_s)} "
            "predicted with those placed at the same moment"
        )
    return lines


def _against(actual_s: float, predicted_s: float | None, slo_s: float | None) -> str:
    said = [] if predicted_s is None else [f"{duration(predicted_s)} predicted"]
    if slo_s is not None:
        verdict = "held" if actual_s <= slo_s else "missed"
        said.append(f"the SLO of {duration(slo_s)} was {verdict}")
    return duration(actual_s) + (f" ({', '.join(said)})" if said else "")


def _phases(p: PhaseSeconds) -> str:
    phases = {
        "queue": p.queue_s,
        "encode": p.encode_s,
        "prefill": p.prefill_s,
        "transfer": p.transfer_s,
        "decode": p.decode_s,
        "lost": p.lost_s,
    }
    spent = [f"{name} {duration(s)}" for name, s in phases.items() if s >= 0.00005]
    return ", ".join(spent) or "none yet"


def duration(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.1f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms"
