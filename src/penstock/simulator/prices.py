"""What a GPU costs for an hour: defaults with their source and date, and files of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.loadgen.files import read_yaml
from penstock.protocol.errors import ConfigError

#: US dollars an hour, SXM: RunPod's as others quoted them in March 2026, who do not agree on what
#: kind of price that is. deploybase.ai/articles/runpod-gpu-pricing has these as spot, and 2.45,
#: 4.76 and 6.35 on demand; deploybase.ai/articles/spot-gpu-pricing has the same as on demand.
#: RunPod's own list was not read. So take them for the cheap end, and give your own with --prices.
DEFAULT_USD: Mapping[str, float] = {"a100": 1.39, "h100": 2.69, "h200": 3.59}
SOURCE = (
    "RunPod's, quoted in March 2026 as spot by one page and as on demand by another "
    "(deploybase.ai); --prices takes yours"
)


def prices_of(text: str | None) -> dict[str, float]:
    """By GPU, from "h100=2.5,h200=3.5" or from a YAML or JSON file with the same; of GPUs that are
    not named, the defaults. Raises `ConfigError`."""
    if text is None:
        return dict(DEFAULT_USD)
    found = _pairs(text) if "=" in text else _file(Path(text).expanduser())
    said = {str(gpu): _price(value, f"the price of {gpu}") for gpu, value in found.items()}
    return {**DEFAULT_USD, **said}


def _pairs(text: str) -> dict[str, Any]:
    found = {}
    for part in text.split(","):
        gpu, equals, price = part.partition("=")
        if not equals or not gpu.strip():
            raise ConfigError(f"--prices {text} is not like h100=2.5,h200=3.5")
        try:
            found[gpu.strip()] = float(price)
        except ValueError:
            raise ConfigError(f"the price of {gpu} is {price!r}, not a number") from None
    return found


def _file(path: Path) -> dict[str, Any]:
    try:
        found = read_yaml(path)
    except ConfigError as exc:
        raise ConfigError(f"--prices {exc.message}") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"--prices {path} has to hold GPUs and prices, such as `h100: 2.5`")
    return found


def _price(value: Any, what: str) -> float:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{what} is {value!r}, not a number of more than 0")
    return float(value)
