"""--config FILE: flags in YAML, TOML or JSON, keyed by their names without the leading dashes."""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

from penstock.cli.parser import Parser, explain_unknown
from penstock.protocol.errors import ConfigError


def parse_with_file(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """What the command line says; where it is silent, what its --config file says."""
    said = parser.parse(arguments)
    file = getattr(said, "config", None)
    if file is None:
        return said
    merged = vars(_parse_file(parser, Path(file)))
    said_model = {"model", "model_flag"} & vars(said).keys()
    if any(vars(said)[name] for name in said_model):
        merged = {name: value for name, value in merged.items() if name != "model_flag"}
    # A positional that is absent is None, not silent.
    merged |= {name: value for name, value in vars(said).items() if value is not None}
    return argparse.Namespace(**merged)


def _parse_file(parser: Parser, path: Path) -> argparse.Namespace:
    known = parser.flags()
    words: list[str] = []
    for key, value in _load(path).items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in known or flag in ("--config", "--help"):
            raise ConfigError(f"{path}: {explain_unknown(flag, known).replace('--', '')}")
        words += _words(path, flag, value, known)
    try:
        return parser.parse(words)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.message}") from exc


def _words(path: Path, flag: str, value: Any, known: list[str]) -> list[str]:
    match value:
        case None:
            return []
        case True:
            return [flag]
        case False:
            negative = flag.replace("--", "--no-", 1)
            return [negative] if negative in known else []
        case list():
            return [flag, *(str(item) for item in value)] if value else []
        case int() | float() | str():
            return [f"{flag}={value}"]
    raise ConfigError(f"{path}: {flag.removeprefix('--')} cannot be a {type(value).__name__}")


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}") from exc
    try:
        found = _parse_text(path, text)
    except ValueError as exc:
        line = " ".join(str(exc).split())
        raise ConfigError(f"{path} cannot be parsed: {line}") from exc
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold flags by name, such as `port: 9000`")
    return found


def _parse_text(path: Path, text: str) -> Any:
    """Raises ValueError."""
    match path.suffix.lower():
        case ".json":
            return json.loads(text)
        case ".toml":
            return tomllib.loads(text)
        case ".yaml" | ".yml":
            import yaml

            try:
                return yaml.safe_load(text)
            except yaml.YAMLError as exc:
                raise ValueError(str(exc)) from exc
    raise ConfigError(f"{path}: name it .yaml, .toml or .json, so that its format is known")
