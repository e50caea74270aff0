"""`penstock costs`: the cost model that a running instance has fitted to itself, as a file.

What it writes is what `hardware:` of a cluster file and `--model-cost` read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from penstock.cli import client
from penstock.cli.parser import Parser
from penstock.cli.top import KEY_VARIABLE, Source
from penstock.protocol.errors import ConfigError, EngineUnavailable
from penstock.service.report import InstanceReport

#: A model of fewer steps than this is mostly noise.
ENOUGH_STEPS = 64


def make_parser() -> Parser:
    parser = Parser(
        "costs",
        "Write the cost model that a running instance has fitted to its own steps, and what it\n"
        "has room for, as JSON: `penstock simulate`, `plan` and `advise` read it.",
        "It is as good as the work it has seen: prompts of several lengths, several at once.",
    )
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", help="of the service (http://127.0.0.1:8000)")
    add("--instance", metavar="NAME", help="which one (the one that has computed the most steps)")
    add("--out", metavar="FILE", help="where to (standard output)")
    add("--admin-key", metavar="KEY", help=f"the service's key for /admin; else ${KEY_VARIABLE}")
    return parser


def run(arguments: list[str]) -> int:
    options = make_parser().parse(arguments)
    key = getattr(options, "admin_key", None) or os.environ.get(KEY_VARIABLE)
    with client.connect(getattr(options, "url", "http://127.0.0.1:8000"), key) as http:
        report = Source(http, str(http.base_url)).fetch()
    chosen = choose(report.instances, getattr(options, "instance", None))
    text = json.dumps(as_file(chosen), indent=1) + "\n"
    out = getattr(options, "out", None)
    if out is None:
        sys.stdout.write(text)
        return 0
    try:
        Path(out).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"--out {out} cannot be written: {exc.strerror}") from exc
    return 0


def choose(instances: list[InstanceReport], name: str | None) -> InstanceReport:
    """Raises `ConfigError`, and `EngineUnavailable` for one that has computed too little."""
    if name is not None and name not in {i.name for i in instances}:
        known = ", ".join(i.name for i in instances) or "there are none"
        raise ConfigError(f"--instance {name} is not among the instances ({known})")
    wanted = [i for i in instances if name is None or i.name == name]
    chosen = max(wanted, key=_num_steps, default=None)
    if chosen is None or chosen.kv is None or chosen.cost is None:
        raise EngineUnavailable("no instance has said yet what its steps cost")
    if _num_steps(chosen) < ENOUGH_STEPS:
        raise EngineUnavailable(
            f"{chosen.name} has computed {_num_steps(chosen)} steps, too few to go by "
            f"({ENOUGH_STEPS}): give it some work, as with `penstock bench`"
        )
    return chosen


def _num_steps(instance: InstanceReport) -> int:
    return instance.cost.num_steps if instance.cost is not None else 0


def as_file(instance: InstanceReport) -> dict[str, Any]:
    """What `loadgen.costs.from_file` reads, and where it comes from."""
    cost, kv = instance.cost, instance.kv
    assert cost is not None and kv is not None
    kv_tokens = kv.total * kv.block_tokens
    total_bytes = kv.tiers["device"].total_bytes or 0
    found = {
        "about": {
            "instance": instance.name,
            "model": instance.model,
            "device": instance.device,
            "steps": cost.num_steps,
            "residual_s": cost.residual_s,
            "mean_step_s": instance.steps.mean_s if instance.steps else None,
        },
        "base_s": cost.base_s,
        "per_token_s": cost.per_token_s,
        "per_row_s": cost.per_row_s,
        "per_context_token_s": cost.per_context_token_s,
        "per_attention_s": cost.per_attention_s,
        "kv_tokens": kv_tokens,
        "kv_bytes_per_token": total_bytes // kv_tokens if kv_tokens else 0,
        "step_tokens": instance.max_num_batched_tokens,
        "max_running": instance.max_running,
    }
    return {name: value for name, value in found.items() if value is not None}
