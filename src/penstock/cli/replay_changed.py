"""`penstock replay INCIDENT --change ...`: what would have come of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock.loadgen.traces import write_trace
from penstock.service.explain_text import duration
from penstock.service.recording import Recording
from penstock.simulator.incident import Replay
from penstock.simulator.recorded_run import Fault, RecordedRun, collect
from penstock.simulator.what_if import Told, WhatIf, what_if

#: Off by less than this in the median, the simulation is worth something.
_CLOSE = 0.25
#: Asks which failures there are.
_LIST = "without=?"
#: As of `penstock replay` without a change.
INCOMPLETE = 3


def run(recording: Recording, said: Mapping[str, Any]) -> int:
    """0, or `INCOMPLETE` where the recording is damaged. Raises `ConfigError`."""
    recorded = collect(Replay(recording))
    if recording.problem:
        print(f"penstock: {recording.path}: {recording.problem}", file=sys.stderr)
    _tell(recorded, said)
    return INCOMPLETE if recording.problem else 0


def _tell(recorded: RecordedRun, said: Mapping[str, Any]) -> None:
    if "export_trace" in said:
        write_trace(Path(said["export_trace"]), recorded.trace())
    if "change" not in said:
        found = {"requests": len(recorded.sequences), "written_to": said["export_trace"]}
        text = f"{found['requests']} requests written to {found['written_to']}"
        print(json.dumps(found, indent=1) if "json" in said else text)
        return
    if _LIST in said["change"]:
        faults = [_plain(fault) for fault in recorded.faults]
        text = "\n".join(_failure(fault) for fault in recorded.faults) or "no failures"
        print(json.dumps({"faults": faults}, indent=1) if "json" in said else text)
        return
    result = what_if(recorded, said["change"], said.get("seed", 0))
    print(json.dumps(_for_programs(result), indent=1) if "json" in said else _text(result))


def _for_programs(result: WhatIf) -> dict[str, Any]:
    return asdict(result) | {"faults": [_plain(fault) for fault in result.faults]}


def _plain(fault: Fault) -> dict[str, Any]:
    found = asdict(fault)
    if fault.until_s == float("inf"):  # JSON has no infinity
        found["until_s"] = None
    return found


def _text(result: WhatIf) -> str:
    told = (result.recorded, result.unchanged, result.changed)
    lines = [f"with {result.change}:", ""]
    head = f"{'':<22}{'TTFT p50':>10}{'p90':>10}{'p99':>10}{'TPOT p50':>10}{'p99':>10}"
    lines.append(head + f"{'in SLO':>8}{'answered':>11}{'resumed':>9}")
    lines += [_row(t) for t in told]
    lines += ["", "first tokens by instance:"]
    lines += [f"  {t.name:<20}  " + ", ".join(_placements(t)) for t in told]
    if result.faults:
        lines += ["", "failures in the recording:"]
        lines += [f"  {_failure(f)}" for f in result.faults]
    lines += ["", *_trust(result), *result.notes]
    return "\n".join(lines)


def _row(t: Told) -> str:
    ttft, tpot = t.ttft_s or {}, t.tpot_s or {}
    cells = [ttft.get("p50"), ttft.get("p90"), ttft.get("p99"), tpot.get("p50"), tpot.get("p99")]
    times = "".join(f"{'-' if c is None else duration(c):>10}" for c in cells)
    attained = "-" if t.attained is None else f"{100 * t.attained:.1f}%"
    answered = f"{t.answered}/{t.requests}"
    return f"{t.name:<22}{times}{attained:>8}{answered:>11}{t.resumed:>9}"


def _placements(t: Told) -> list[str]:
    return [f"{name} {count}" for name, count in t.placements.items()]


def _failure(fault: Fault) -> str:
    if fault.until_s == float("inf"):
        return f"{fault.name} at {fault.at_s:.1f} s, for good"
    return f"{fault.name} at {fault.at_s:.1f} s, for {duration(fault.until_s - fault.at_s)}"


def _trust(result: WhatIf) -> list[str]:
    errors = {"TTFT": result.ttft_error, "TPOT": result.tpot_error}
    known = {name: error for name, error in errors.items() if error is not None}
    if not known:
        return ["nothing was answered twice: how good the simulation is cannot be said"]
    said = " and ".join(f"{name} by {100 * error:.0f}%" for name, error in known.items())
    lines = [f"the unchanged simulation is off what was recorded: {said} in the median request"]
    if max(known.values()) > _CLOSE:
        lines.append(
            "that is much: go by how the two simulations differ, not by their times themselves"
        )
    return lines
