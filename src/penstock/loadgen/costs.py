"""What an instance of some hardware costs and holds, for planning: from our file or the user's."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from penstock.loadgen.files import read_small
from penstock.protocol.errors import ConfigError
from penstock.protocol.instance import CostModel

_TERMS = ("base_s", "per_token_s", "per_row_s", "per_context_token_s", "per_attention_s")
#: More than the largest instances hold many times over: books of it would fill the memory.
MOST_KV_TOKENS = 10**8
_LONGEST_S, _MOST = 3600.0, 10**9
#: Of a name of hardware: gpu:model:dtype:tpN.
_PARTS = 4
#: With less room than this there is no cost model (as `tools/gpu_models.py` has it).
_LEAST_KV_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class InstanceModel:
    """One instance as a cost model with limits."""

    name: str
    cost: CostModel
    #: KV that fits, and bytes of it a token (for transfers).
    kv_tokens: int
    kv_bytes_per_token: int
    step_tokens: int = 2048
    max_running: int = 256
    gpus: int = 1
    #: Of the fit, relative, on what it was fitted to; 0 where nothing is known about it.
    median_error: float = 0.0

    def step_s(self, new_tokens: int, rows: int, reads: int, products: int) -> float:
        """`reads`: context tokens summed over rows; `products`: new times context tokens."""
        c = self.cost
        return (
            c.base_s
            + c.per_token_s * new_tokens
            + c.per_row_s * rows
            + c.per_context_token_s * reads
            + c.per_attention_s * products
        )

    def prefill_s(self, num_tokens: int) -> float:
        """A prompt on an idle instance."""
        total_s = 0.0
        for start in range(0, num_tokens, self.step_tokens):
            end = min(start + self.step_tokens, num_tokens)
            total_s += self.step_s(end - start, 1, end, (end - start) * end)
        return total_s


def known_hardware() -> dict[str, dict[str, Any]]:
    """`gpu:model:dtype:tpN` -> coefficients and limits."""
    text = files("penstock.loadgen").joinpath("costs.json").read_text()
    found: dict[str, dict[str, Any]] = json.loads(text)["costs"]
    return found


def find_hardware(name: str) -> str:
    """The whole name of the hardware that `name` means; it may leave out tpN, for as few GPUs as it
    takes (h100:llama3.1-8b:bf16), and what there is only one of. Raises `ConfigError`."""
    known = known_hardware()
    matches = matching_hardware(name)
    if len({match.rpartition(":")[0] for match in matches}) > 1:
        raise ConfigError(f"hardware {name} may be {', '.join(matches)}: say which")
    return min(matches, key=lambda match: int(known[match]["gpus"]))


def matching_hardware(name: str) -> list[str]:
    """Whole names that are `name` or begin with it. Raises `ConfigError` where there is none, with
    the part of the name that is to blame."""
    known = known_hardware()
    said, begins = name.split(":"), ""
    for place, part in enumerate(said[:_PARTS]):
        there = dict.fromkeys(k.split(":")[place] for k in known if k.startswith(begins))
        if part not in there:
            why = _too_small(begins, part) or "is not known"
            raise ConfigError(
                f"hardware {name} {why}: in place of {part} write {' or '.join(there)}"
            )
        begins += f"{part}:"
    if len(said) > _PARTS:
        raise ConfigError(f"hardware {name} has more parts than gpu:model:dtype:tpN")
    return [k for k in known if f"{k}:".startswith(begins)]


def _too_small(kind: str, tp: str) -> str:
    """Of gpu:model:dtype: and tpN, why so few GPUs do not hold the model; "" where they may. What
    they have, and what the weights take, follows from the room for KV on two numbers of GPUs."""
    known = known_hardware()
    number = re.fullmatch(r"tp([1-9]\d*)", tp)
    of = {int(v["gpus"]): v for k, v in known.items() if k.startswith(kind)}
    few, many = min(of), max(of)
    if number is None or few == many:
        return ""
    kv_bytes = {n: of[n]["kv_tokens"] * of[n]["kv_bytes_per_token"] for n in (few, many)}
    gpu_bytes = (kv_bytes[many] - kv_bytes[few]) / (many - few)
    weight_bytes, have_bytes = few * gpu_bytes - kv_bytes[few], int(number[1]) * gpu_bytes
    if have_bytes - weight_bytes >= _LEAST_KV_TOKENS * of[few]["kv_bytes_per_token"]:
        return ""
    return (
        f"does not hold the model, whose weights take {weight_bytes / 1e9:.0f} GB where there are "
        f"{have_bytes / 1e9:.0f} GB for them and for KV"
    )


def hardware(name: str, step_tokens: int = 2048, max_running: int = 256) -> InstanceModel:
    """As `find_hardware` finds it."""
    found = find_hardware(name)
    return _model(found, known_hardware()[found], step_tokens, max_running)


def from_file(path: Path, step_tokens: int = 2048, max_running: int = 256) -> InstanceModel:
    """A JSON object with the coefficients (those of an instance's heartbeats or card will do),
    kv_tokens and kv_bytes_per_token."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"the cost model {path} is no file")
    text = read_small(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"the cost model {path} is not JSON: {exc}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"the cost model {path} is not a JSON object")
    return _model(str(path), found, step_tokens, max_running)


def hardware_or_file(name: str, step_tokens: int = 2048, max_running: int = 256) -> InstanceModel:
    """A name of `known_hardware`; or, with a slash in it or .json at its end, a file for
    `from_file`, such as `penstock costs` writes."""
    if "/" in name or name.endswith(".json"):
        return from_file(Path(name), step_tokens, max_running)
    return hardware(name, step_tokens, max_running)


def _model(name: str, found: dict[str, Any], step_tokens: int, max_running: int) -> InstanceModel:
    values = {}
    for term in (*_TERMS, "kv_tokens", "kv_bytes_per_token"):
        value = found.get(term, 0.0)
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{name}: {term} is {value!r}, not a number of at least 0")
        values[term] = float(value)
        most = {"kv_tokens": MOST_KV_TOKENS, "kv_bytes_per_token": _MOST}.get(term, _LONGEST_S)
        if value > most:
            raise ConfigError(f"{name}: {term} is {value:g}, more than {most:g}")
    if not values["base_s"] + values["per_token_s"] + values["per_row_s"]:
        raise ConfigError(f"{name} lacks base_s and per_token_s: a step of one token takes no time")
    if not values["kv_tokens"]:
        raise ConfigError(f"{name} lacks kv_tokens, which has to be more than 0")
    cost = CostModel(
        base_s=values["base_s"],
        per_token_s=values["per_token_s"],
        per_row_s=values["per_row_s"],
        per_context_token_s=values["per_context_token_s"],
        per_attention_s=values["per_attention_s"],
    )
    return InstanceModel(
        name,
        cost,
        int(values["kv_tokens"]),
        int(values["kv_bytes_per_token"]),
        _count(name, "step_tokens", found.get("step_tokens", step_tokens)),
        _count(name, "max_running", found.get("max_running", max_running)),
        _count(name, "gpus", found.get("gpus", 1)),
        float(found.get("median_error", 0.0)),
    )


def _count(name: str, field: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MOST:
        raise ConfigError(f"{name}: {field} is {value!r}, not a whole number of at least 1")
    return value
