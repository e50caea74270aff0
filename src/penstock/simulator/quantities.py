"""Times and SLOs as people write them: 50ms, 1s, 10m, ttft=1s,tpot=50ms."""

from __future__ import annotations

import math
import re

from penstock.protocol.errors import ConfigError

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: object, what: str) -> float:
    """ "50ms" in seconds, at least 0; `what` names it where it is none. Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(us|ms|s|m|h)\s*", str(text))
    if match is None:
        raise ConfigError(f"{what} is {text!r}: write a time with its unit, as in 50ms, 1s or 10m")
    # 50 / 1e6, not 50 * 1e-6: so that what is written is what is read.
    number, unit = float(match[1]), match[2]
    found = number / {"us": 1e6, "ms": 1e3}[unit] if unit in ("us", "ms") else (
        number * _UNITS_S[unit]
    )  # fmt: skip
    if not math.isfinite(found):
        raise ConfigError(f"{what} is {text!r}: that is too long")
    return found


def text_of(seconds: float) -> str:
    """What `seconds_of` reads back, in the unit that makes it shortest to read."""
    if seconds == 0 or seconds >= 1:
        return f"{seconds!r}s".replace(".0s", "s")
    for unit, factor in (("ms", 1e3), ("us", 1e6)):
        number = f"{seconds * factor:.6g}"
        if "e" not in number and float(number) / factor == seconds and float(number) >= 1:
            return f"{number}{unit}"
    return f"{seconds:.20f}".rstrip("0") + "s"


def counted(number: int, what: str) -> str:
    """ "1 GPU", "1,000 GPUs"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def ms(seconds: float) -> str:
    """For people: "6.33 ms", "1,234 ms"."""
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def slos_of(text: str) -> tuple[float, float]:
    """ "ttft=1s,tpot=50ms" as (TTFT, TPOT) in seconds. Raises `ConfigError`."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(ttft|tpot)=(.+)", part)
        if match is None or match[1] in found:
            raise ConfigError(f"--slo {text} is not like ttft=1s,tpot=50ms")
        found[match[1]] = seconds_of(match[2], f"--slo {match[1]}")
    if len(found) < 2 or not all(found.values()):
        raise ConfigError(f"--slo {text} has to give a ttft and a tpot, both more than 0")
    return found["ttft"], found["tpot"]
