"""Resident engines in turn: rounds of tasks, with probes around each run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.compare.engines import Bench, Variant
from benchmarks.compare.memory import most_of
from benchmarks.compare.probes import Probe
from benchmarks.compare.process import EngineFailed, Worker
from benchmarks.compare.summary import worth_repeating
from benchmarks.compare.tasks import Task, same_model_job, warm_up_jobs

Say = Callable[[str], None]
#: An engine that starts slower than this is started once; a second, warm start would take as long.
SLOW_START_S = 60.0


@dataclass
class Found:
    """What a run brings together, whole after each round."""

    records: list[dict[str, Any]] = field(default_factory=list)
    #: engine -> seconds from the start of its process to its first token, each start.
    starts_s: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    same_model_ids: dict[str, list[list[int]]] = field(default_factory=dict)
    #: engine -> why it is not in the results, or not in all of them.
    missing: dict[str, str] = field(default_factory=dict)


class Rounds:
    """Runs waves of engines. An engine that fails is named, dropped, and the rest goes on."""

    def __init__(self, bench: Bench, probe: Probe, found: Found, say: Say) -> None:
        self._bench, self._probe, self._found, self._say = bench, probe, found, say
        self._resident: dict[str, Worker] = {}

    def run(
        self,
        waves: Sequence[Sequence[Variant]],
        tasks: Sequence[Task],
        repeats: int,
        slow_s: float,
        always: Sequence[str],
        *,
        twice: bool,
    ) -> None:
        """Engines of a wave are resident together; one that is in the next wave too stays.
        `twice`: start each once more, so that the second start finds its caches warm."""
        try:
            for number, wave in enumerate(waves):
                self._retire(keep={variant.name for variant in wave})
                for variant in wave:
                    self._admit(variant, twice=twice)
                for repeat in range(repeats):
                    self._round(number, repeat, tasks, slow_s, always)
        finally:
            self._retire(keep=set())

    # --- engines come and go -------------------------------------------------------------------

    def _admit(self, variant: Variant, *, twice: bool) -> None:
        if variant.name in self._resident or variant.name in self._found.missing:
            return
        try:
            self._bench.prepare(variant, self._say)
            worker = self._start(variant)
            if twice and worker.start_to_first_token_s < SLOW_START_S:
                worker.close()
                worker = self._start(variant)
            self._resident[variant.name] = worker
            for job in warm_up_jobs(self._bench.sizes.vocab_size):
                worker.run(job.prompts, job.max_tokens)
            job = same_model_job(self._bench.sizes.vocab_size)
            reply = worker.run(job.prompts, job.max_tokens, want_ids=True)
        except (EngineFailed, subprocess.CalledProcessError) as exc:
            self._drop(variant.name, f"does not start: {exc}")
            return
        hello, found = worker.hello, self._found
        found.versions[variant.kind] = hello["version"]
        found.weight_bytes[variant.name] = hello["weight_bytes"] or self._bench.weight_bytes(
            variant
        )
        found.same_model_ids[variant.name] = reply["ids"]
        self._remember(variant.name, hello)

    def _start(self, variant: Variant) -> Worker:
        worker = Worker(self._bench, variant)
        took_s = worker.start_to_first_token_s
        self._found.starts_s.setdefault(variant.name, []).append(took_s)
        self._say(f"{variant.name}: start to first token {took_s:.1f} s")
        return worker

    def _remember(self, name: str, said: dict[str, Any]) -> None:
        self._found.memory[name] = most_of(said, self._found.memory.get(name, {}))

    def _drop(self, name: str, why: str) -> None:
        self._say(f"{name} is left out from here on: {why}")
        # A library's last words may hold paths of this machine: they are said, not kept.
        self._found.missing[name] = why.partition(":")[0]
        if worker := self._resident.pop(name, None):
            worker.close()

    def _retire(self, keep: set[str]) -> None:
        for name in [name for name in self._resident if name not in keep]:
            self._resident.pop(name).close()

    # --- one round -----------------------------------------------------------------------------

    def _round(
        self, wave: int, repeat: int, tasks: Sequence[Task], slow_s: float, always: Sequence[str]
    ) -> None:
        for task in tasks:
            names = list(self._resident)
            # Every other round backwards, so that nobody always comes after the same neighbour.
            for name in names if repeat % 2 == 0 else reversed(names):
                own = [r for r in self._found.records if r["wave"] == wave]
                if not worth_repeating(own, name, task.name, slow_s, always):
                    continue
                try:
                    record = self._measure(name, task, repeat)
                except EngineFailed as exc:
                    self._drop(name, f"failed in {task.name}: {exc}")
                    continue
                self._found.records.append({"wave": wave, "repeat": repeat, **record})

    def _measure(self, name: str, task: Task, repeat: int) -> dict[str, Any]:
        worker = self._resident[name]
        job = task.job(repeat, self._bench.sizes.vocab_size)
        before = self._probe.read()
        others = [w for w in self._resident.values() if w is not worker]
        started_s, idle_cpu_s = time.monotonic(), sum(w.cpu_s() for w in others)
        reply = worker.run(job.prompts, job.max_tokens)
        idle_cpu_s = sum(w.cpu_s() for w in others) - idle_cpu_s
        idle_share = idle_cpu_s / (time.monotonic() - started_s)
        reading = before.mean(self._probe.read())
        self._remember(name, reply)
        record = {
            "engine": name,
            "task": task.name,
            "context_tokens": task.context_tokens,
            **{k: v for k, v in reply.items() if not k.endswith("_bytes")},
            **asdict(reading),
            "others_cpu_share": idle_share,
        }
        # Ticks of the clock are 10 ms: of a short run they say nothing.
        disturbed = idle_share > 0.05 and idle_cpu_s > 0.05
        busy = f", while the others used {idle_share:.0%} of a core" if disturbed else ""
        self._say(f"  {repeat} {task.name:13} {name:14} {reply['elapsed_s']:7.2f} s{busy}")
        return record
