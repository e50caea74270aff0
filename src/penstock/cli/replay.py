"""`penstock replay INCIDENT`: a recorded run of a service, again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock import PROJECT, __version__
from penstock.cli.parser import Parser
from penstock.cli.trace_flags import seconds_of
from penstock.protocol.errors import ConfigError
from penstock.service.recording import Recording, code_digest, open_recording
from penstock.simulator.incident import Moment, Replay
from penstock.simulator.timeline import Line, Timeline, everything, is_about

_EPILOG = """INCIDENT: what `penstock serve --record FILE` (or router) has written. Replayed, every
decision is made again from what came in, and compared with what was decided then. With --change
the recorded requests, instances and failures are put into the simulator, once as they were and
once changed:
  policy=least-load  pd=off|auto|P:D  instances=+1|-1|N  ttft_slo=2s  tpot_slo=50ms
  without=NAME-crash (a failure that --change without=? lists)  speed=1.5"""


def make_parser() -> Parser:
    parser = Parser(
        "replay",
        "Replay a recorded run of a service exactly: what came in, what was decided, and why.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("incident", metavar="INCIDENT", help="a recording")
    add("--from", dest="from_s", type=seconds_of, metavar="TIME",
        help="show what came after this time (90, 90s, 10m)")  # fmt: skip
    add("--until", dest="until_s", type=seconds_of, metavar="TIME", help="and end there")
    add("--request", metavar="ID", help="only what concerns this request")
    add("--instance", metavar="NAME", help="only what concerns this instance")
    add("--step", action="store_true",
        help="every input with all its effects; in a terminal one at a time")  # fmt: skip
    add("--change", metavar="WHAT=HOW", action="append",
        help="what if this had been otherwise (may be given several times)")  # fmt: skip
    add("--seed", type=int, help="of the simulation (0)")
    add("--export-trace", metavar="FILE", help="the recorded requests as a trace")
    add("--json", action="store_true", help="the result for programs")
    return parser


#: The exit code where the recording is damaged or torn: what there is of it came out as recorded.
INCOMPLETE = 3
#: Where what was asked for is nowhere in the recording.
NOT_THERE = 2
#: Of the time line, which runs with a change do not have.
_OF_THE_TIME_LINE = ("from_s", "until_s", "request", "instance", "step")


def run(arguments: Sequence[str]) -> int:
    """0 if everything came out as it was recorded, 1 if something did not, `INCOMPLETE` if that was
    not all of it (unless --until asked for no more), `NOT_THERE` if nothing of it was asked for."""
    said = vars(make_parser().parse(arguments))
    recording = open_recording(Path(said["incident"]))
    if "change" in said or "export_trace" in said:
        from penstock.cli.replay_changed import run as run_changed

        for name in _OF_THE_TIME_LINE:
            if name in said:
                flag = name.removesuffix("_s")
                raise ConfigError(f"--{flag} is about the time line, which a plain replay shows")
        return run_changed(recording, said)
    if "seed" in said:
        raise ConfigError("--seed is of a simulation: give it with --change")
    return _ForPrograms(said).run(recording) if "json" in said else _Shown(said).run(recording)


class _Wanted:
    """The part of a run that was asked for, and whether there is any of it."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        """Raises `ConfigError` for a stretch of time that ends before it begins."""
        self._from_s, self.until_s = said.get("from_s", 0.0), said.get("until_s", float("inf"))
        if self.until_s < self._from_s:
            raise ConfigError(f"--until {self.until_s:g} s is before --from {self._from_s:g} s")
        self._request, self._instance = said.get("request"), said.get("instance")
        self.filters = self._request is not None or self._instance is not None
        self._moments = self._lines = self._lines_then = 0
        self._instances: dict[str, None] = {}

    def is_shown(self, moment: Moment) -> bool:
        return moment.at_s >= self._from_s or bool(moment.difference)

    def of(self, moment: Moment, lines: list[Line]) -> list[Line]:
        """Told of every moment until then."""
        self._instances |= dict.fromkeys(name for line in lines for name in line.instances)
        lines = [line for line in lines if is_about(line, self._request, self._instance)]
        self._lines += len(lines)
        if self.is_shown(moment):
            self._moments += 1
            self._lines_then += len(lines)
        return lines

    @property
    def is_nowhere(self) -> bool:
        asked_for = self.filters or self._from_s > 0
        return asked_for and not (self._moments and (self._lines or not self.filters))

    def missed(self, end_s: float) -> str:
        """Why nothing was shown; "" if something was."""
        if not self._moments and end_s > self.until_s:
            return f"nothing is recorded from {self._from_s:g} s to {self.until_s:g} s"
        if not self._moments:
            return f"nothing is recorded from {self._from_s:g} s on: it ends at {end_s:.3f} s"
        if not self.filters or self._lines_then:
            return ""
        asked = (("request", self._request), ("instance", self._instance))
        whom = " with ".join(f"{what} {name}" for what, name in asked if name is not None)
        if self._lines:
            return f"nothing concerns {whom} in this stretch of time; elsewhere something does"
        known = ", ".join(self._instances) or "none"
        upto = f" up to {self.until_s:g} s" if self.until_s < end_s else ""
        return f"nothing concerns {whom}{upto}; the instances are: {known}"


class _Shown:
    """The time line in a terminal."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        self._said = said
        self._wanted = _Wanted(said)
        self._steps = "step" in said
        self._asks = self._steps and sys.stdin.isatty() and sys.stdout.isatty()

    def run(self, recording: Recording) -> int:
        self.begin(recording)
        replay = Replay(recording)
        timeline = Timeline(replay.core)
        last: Moment | None = None
        for moment in replay:
            last = moment
            lines = timeline.lines(moment)
            if moment.at_s > self._wanted.until_s and not moment.difference:
                break
            lines = self._wanted.of(moment, lines)
            if self._wanted.is_shown(moment) and not self.show(moment, lines):
                break
        return self.end(replay, last)

    def begin(self, recording: Recording) -> None:
        header = recording.header
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.started_unix_s))
        print(
            f"{recording.path}: {header.recipe.config.name}, policy {header.recipe.policy}, "
            f"recorded {when} by release {header.version}"
            + ("" if header.version == __version__ else f" (this is {__version__})")
        )

    def show(self, moment: Moment, lines: list[Line]) -> bool:
        """False: the reader has seen enough."""
        if self._steps:
            if not self._wanted.filters or lines:
                _print(moment.at_s, f"step {moment.number}", everything(moment))
                return not self._asks or _goes_on()
            return True
        for line in lines:
            _print(line.at_s, line.text, line.why)
        return True

    def end(self, replay: Replay, last: Moment | None) -> int:
        if last is None:
            print(f"it holds no steps ({replay.recording.problem or 'nothing happened'})")
            return self._code(replay)
        if replay.recording.problem:
            print(f"the recording: {replay.recording.problem}")
        if last.difference:
            print(f"step {last.number} at {last.at_s:.3f} s differs: {last.difference}")
            print(blame(replay.recording))
            return 1
        if missed := self._wanted.missed(last.at_s):
            print(missed)
        print(
            f"{last.number + 1} steps in {last.at_s:.1f} s: all that came of them came again, "
            "effect by effect"
        )
        return self._code(replay)

    def _code(self, replay: Replay) -> int:
        if replay.recording.problem and "until_s" not in self._said:
            return INCOMPLETE
        return NOT_THERE if self._wanted.is_nowhere else 0


class _ForPrograms(_Shown):
    """One JSON object, and nothing else."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__({k: v for k, v in said.items() if k != "step"})
        self._found: list[dict[str, Any]] = []

    def begin(self, recording: Recording) -> None:
        pass

    def show(self, moment: Moment, lines: list[Line]) -> bool:
        self._found += [asdict(line) for line in lines]
        return True

    def end(self, replay: Replay, last: Moment | None) -> int:
        header = replay.recording.header
        differs = last is not None and bool(last.difference)
        result = {
            "service": header.recipe.config.name,
            "policy": header.recipe.policy,
            "recorded_by": header.version,
            "recorded_by_this_code": header.code == code_digest(),
            "recorded_unix_s": header.started_unix_s,
            "steps": 0 if last is None else last.number + 1,
            "seconds": 0.0 if last is None else last.at_s,
            "identical": not differs,
            "complete": not differs and not replay.recording.problem,
            "difference": None
            if last is None or not differs
            else {"step": last.number, "at_s": last.at_s, "what": last.difference},
            "problem": replay.recording.problem or None,
            "timeline": self._found,
        }
        print(json.dumps(result, indent=1))
        if not differs and last is not None and (missed := self._wanted.missed(last.at_s)):
            print(f"{PROJECT}: {missed}", file=sys.stderr)
        return 1 if differs else self._code(replay)


def _goes_on() -> bool:
    try:
        return input("Enter: on, q: end ").strip() != "q"
    except EOFError:
        return False


def _print(at_s: float, text: str, more: Sequence[str]) -> None:
    print(f"{at_s:10.3f} s  {text}")
    for line in more:
        print(f"{'':14}{line}")


def blame(recording: Recording) -> str:
    """Why it differs."""
    if recording.header.version != __version__:
        return (
            f"it was recorded by release {recording.header.version}, and {__version__} decides "
            "otherwise: replay it with the release that recorded it"
        )
    if recording.header.code != code_digest():
        return (
            f"it was recorded by other code of release {recording.header.version} "
            f"({recording.header.code or 'unknown'}, this is {code_digest()}), which decided "
            "otherwise: replay it with that"
        )
    return "the same code decided otherwise on the same inputs: please report this as a bug"
