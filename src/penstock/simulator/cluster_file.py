"""`cluster.yaml`: a cluster to simulate, as a file (`examples/simulate.yaml` explains each field).

Names are those of flags, with dashes or underscores. What is not known is an error, never ignored.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from penstock.loadgen.costs import (
    MOST_KV_TOKENS,
    hardware_or_file,
    matching_hardware,
)
from penstock.loadgen.files import read_yaml
from penstock.protocol.errors import ConfigError
from penstock.protocol.kv import BLOCK_TOKENS
from penstock.service.policies.routing import policy_named
from penstock.simulator.quantities import seconds_of, text_of
from penstock.simulator.spec import ClusterSpec, FaultSpec, LinkSpec, PoolSpec

#: Reads a value, given what to call it in an error.
_Reader = Callable[[Any, str], Any]
#: More than this is a mistake, and would only use up the memory.
_MOST_INSTANCES, _MOST_TIER_TOKENS, _MOST = 100_000, 10**12, 10**9
_LONGEST_S = 3600.0
#: Fields of the cluster files of `penstock up`.
_OF_UP = {"routers", "workers"}


def read_cluster(path: Path) -> ClusterSpec:
    """Raises `ConfigError` that names the file, and the field at fault."""
    found = read_yaml(path)
    if isinstance(found, dict) and found.keys() & _OF_UP:
        raise ConfigError(
            f"{path} is a cluster for `penstock up`: one to simulate has pools, as "
            "examples/simulate.yaml has"
        )
    try:
        spec = parse_cluster(found, path.parent)
        if spec.admission and spec.ttft_slo_s is None:
            raise ConfigError("admission refuses what would miss slo.ttft, which is not there")
        return spec
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.message}") from None


def parse_cluster(found: Any, folder: Path = Path()) -> ClusterSpec:
    """What `yaml.safe_load` gives. Files with cost models are looked for in `folder`."""
    values = _record(found, "the file", _CLUSTER)
    pools = values.pop("pools", None)
    if pools is None:
        raise ConfigError("there is no field pools")
    values["pools"] = tuple(
        _pool(pool, f"pools[{place}]", folder) for place, pool in enumerate(pools)
    )
    values |= values.pop("slo", {})
    _check_pools(values["pools"])
    spec = ClusterSpec(**values)
    policy_named(spec.policy)
    _ = spec.static_split  # raises where `pd` is none of those that there are
    return spec


def _check_pools(pools: Sequence[PoolSpec]) -> None:
    if (total := sum(pool.count for pool in pools)) > _MOST_INSTANCES:
        raise ConfigError(f"pools have {total} instances in all, more than {_MOST_INSTANCES}")
    # A file with a cost model does not say of which model it is.
    names = [p.hardware for p in pools if "/" not in p.hardware and ":" in p.hardware]
    models = list(dict.fromkeys(name.split(":")[1] for name in names))
    if len(models) > 1:
        raise ConfigError(
            f"pools are of different models ({', '.join(models)}): one service serves one, so that "
            "any of its instances can answer; simulate them one by one"
        )


def write_cluster(spec: ClusterSpec) -> str:
    """YAML that `parse_cluster` reads back as `spec`; defaults are left out."""
    found = _plain(spec, ("name", "policy", "pd", "admission", "kv_index", "max_queue"))
    found["pools"] = [_plain(pool, _POOL) for pool in spec.pools]
    if (link := spec.link) != LinkSpec():
        found["link"] = {
            "latency": text_of(link.latency_s),
            "jitter": text_of(link.jitter_s),
            "kv-gbit": link.kv_gbit,
            "host-kv-gbit": link.host_kv_gbit,
            "disk-kv-gbit": link.disk_kv_gbit,
        }
    if spec.faults:
        found["faults"] = [_fault_plain(fault) for fault in spec.faults]
    slo = {"ttft": spec.ttft_slo_s, "tpot": spec.tpot_slo_s}
    if any(slo.values()):
        found["slo"] = {name: text_of(s) for name, s in slo.items() if s is not None}
    text: str = yaml.safe_dump(found, sort_keys=False)
    return text


def _plain(found: ClusterSpec | PoolSpec, names: Iterable[str]) -> dict[str, Any]:
    """The fields `names` that are not what they are by default."""
    usual = {f.name: f.default for f in fields(found) if f.default is not MISSING}
    values = {name: getattr(found, name) for name in names}
    return {
        name.replace("_", "-"): value
        for name, value in values.items()
        if name not in usual or value != usual[name]
    }


def _fault_plain(fault: FaultSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"at": text_of(fault.at_s), fault.kind: fault.instance}
    if fault.for_s is not None:
        found["for"] = text_of(fault.for_s)
    if fault.kind == "slow":
        found["times"] = fault.times
    return found


def _pool(found: Any, where: str, folder: Path) -> PoolSpec:
    values = _record(found, where, _POOL | {"tp": _whole(1)})
    for name in ("count", "hardware"):
        if name not in values:
            raise ConfigError(f"{where} lacks {name}")
    name, tp = values["hardware"], values.pop("tp", None)
    if "/" in name or name.endswith(".json"):
        if tp is not None:
            raise ConfigError(f"{where}.tp: a file with a cost model is of a TP already")
        # Relative to the cluster file, as it was written there.
        path = folder / name
        values["hardware"] = str(path) if "/" in str(path) else f"./{path}"
        hardware_or_file(values["hardware"])
    else:
        values["hardware"] = _known(name, tp, where)
    return PoolSpec(**values)


def _known(name: str, tp: int | None, where: str) -> str:
    """The whole name of known hardware."""
    if tp is not None and name.count(":") > 2:
        raise ConfigError(f"{where}.tp is {tp}, and hardware {name} says it too: leave one out")
    wanted = name if tp is None else f"{name}:tp{tp}"
    try:
        matches = matching_hardware(wanted)
    except ConfigError as exc:
        raise ConfigError(f"{where}.{exc.message}; or name a file with a cost model") from None
    if len(matches) > 1:
        raise ConfigError(f"{where}.hardware {wanted} may be {', '.join(matches)}: say which")
    return matches[0]


# --- fields ---------------------------------------------------------------------------------------


def _record(found: Any, where: str, known: Mapping[str, _Reader]) -> dict[str, Any]:
    """Values by attribute, each read by its reader."""
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is not a list of fields with values (key: value)")
    values = {}
    prefix = "" if where == "the file" else f"{where}."
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{prefix}{key}: there is no such field{_instead(name, known)}")
        if name in values:
            raise ConfigError(f"{prefix}{key} is there twice")
        values[name] = known[name](value, f"{prefix}{key}")
    return values


def _instead(name: str, known: Mapping[str, _Reader]) -> str:
    """What to write in place of a field that is none of `known`."""
    elsewhere = {
        "each of pools": _POOL | {"tp": _whole(1)},
        "link": _LINK,
        "each of faults": _FAULT,
    }
    where = [place for place, fields_there in elsewhere.items() if name in fields_there]
    if where:
        return f": it belongs to {where[0]}"
    shown = [k.replace("_", "-") for k in known]
    near = difflib.get_close_matches(name.replace("_", "-"), shown, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else f"; there are {', '.join(shown)}"


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{what} is {value!r}, not a text")
    return value


def _one_of(*known: str) -> _Reader:
    def read(value: Any, what: str) -> str:
        if value not in known:
            raise ConfigError(f"{what} is {value!r}, not one of {', '.join(known)}")
        return str(value)

    return read


def _flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{what} is {value!r}, neither true nor false")
    return value


def _whole(least: int, most: int = _MOST) -> _Reader:
    def read(value: Any, what: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{what} is {value!r}, not a whole number of at least {least}")
        if value > most:
            raise ConfigError(f"{what} is more than {most}")
        return value

    return read


def _number(least: float, most: float) -> _Reader:
    def read(value: Any, what: str) -> float:
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or math.isnan(value) or value <= 0:
            raise ConfigError(f"{what} is {value!r}, not a number of more than 0")
        if not least <= value <= most:
            raise ConfigError(f"{what} is {value:g}, not from {least:g} to {most:g}")
        return float(value)

    return read


def _delay(value: Any, what: str) -> float:
    found = seconds_of(value, what)
    if found > _LONGEST_S:
        raise ConfigError(f"{what} is {value}, more than an hour")
    return found


def _split(value: Any, what: str) -> str:
    # YAML takes 2:6 for 126, a number to the base of 60, and off for false.
    if value is False:
        return "off"
    if isinstance(value, int) and not isinstance(value, bool):
        raise ConfigError(f'{what} is {value}, to YAML: write splits in quotes, "2:6"')
    return _text(value, what)


def _pools(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{what} is not a list of pools")
    return value


def _link(value: Any, what: str) -> LinkSpec:
    found = _record(value, what, _LINK)
    return LinkSpec(**{_LINK_FIELDS.get(name, name): number for name, number in found.items()})


def _faults(value: Any, what: str) -> tuple[FaultSpec, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{what} is not a list of faults")
    return tuple(_fault(one, f"{what}[{place}]") for place, one in enumerate(value))


def _fault(value: Any, what: str) -> FaultSpec:
    found = _record(value, what, _FAULT)
    kinds = [kind for kind in ("crash", "freeze", "slow") if kind in found]
    if len(kinds) != 1 or "at" not in found:
        raise ConfigError(f"{what} has an `at`, and one of crash, freeze and slow")
    (kind,) = kinds
    if (kind == "slow") != ("times" in found):
        raise ConfigError(f"{what}: slow has `times`, and nothing else does")
    return FaultSpec(
        at_s=found["at"],
        kind=kind,
        instance=found[kind],
        for_s=found.get("for"),
        times=found.get("times", 1.0),
    )


def _slo(value: Any, what: str) -> dict[str, float]:
    found = _record(value, what, {"ttft": seconds_of, "tpot": seconds_of})
    for name, seconds in found.items():
        if not seconds:
            raise ConfigError(f"{what}.{name} has to be more than 0")
    return {f"{name}_slo_s": seconds for name, seconds in found.items()}


_POOL: dict[str, _Reader] = {
    "name": _text,
    "count": _whole(1, _MOST_INSTANCES),
    "hardware": _text,
    "role": _one_of("any", "prefill", "decode"),
    "max_num_batched_tokens": _whole(1),
    "max_num_seqs": _whole(1),
    "max_model_len": _whole(1),
    "enable_prefix_caching": _flag,
    "kv_tokens": _whole(BLOCK_TOKENS, MOST_KV_TOKENS),
    "host_kv_tokens": _whole(0, _MOST_TIER_TOKENS),
    "disk_kv_tokens": _whole(0, _MOST_TIER_TOKENS),
    "slowdown": _number(1e-3, 1e3),
    "gpu_hour_usd": _number(0.0, 1e6),
}
_LINK: dict[str, _Reader] = {
    "latency": _delay,
    "jitter": _delay,
    "kv_gbit": _number(1e-3, 1e6),
    "host_kv_gbit": _number(1e-3, 1e6),
    "disk_kv_gbit": _number(1e-3, 1e6),
}
_LINK_FIELDS = {"latency": "latency_s", "jitter": "jitter_s"}
_FAULT: dict[str, _Reader] = {
    "at": seconds_of,
    "crash": _text,
    "freeze": _text,
    "slow": _text,
    "for": seconds_of,
    "times": _number(1e-3, 1e3),
}
_CLUSTER: dict[str, _Reader] = {
    "name": _text,
    "pools": _pools,
    "policy": _text,
    "pd": _split,
    "slo": _slo,
    "admission": _flag,
    "kv_index": _flag,
    "max_queue": _whole(1),
    "link": _link,
    "faults": _faults,
}
