"""Files that people hand us and files that we leave them: bounded reading, writing whole or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from penstock.protocol.errors import ConfigError

#: A description of a cluster, of costs or of prices that is longer than this is something else.
MOST_BYTES = 8 << 20


def read_small(path: Path) -> str:
    """A text of at most `MOST_BYTES`. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            found = file.read(MOST_BYTES + 1)
        if len(found) > MOST_BYTES:
            raise ConfigError(f"{path} cannot be read: it is larger than {MOST_BYTES >> 20} MiB")
        return found.decode("utf-8")
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} cannot be read: it is not UTF-8") from None


def read_yaml(path: Path) -> Any:
    """As `yaml.safe_load`, but a key that is there twice is an error. Raises `ConfigError`."""
    text = read_small(path)
    try:
        return yaml.load(text, _OnceEach)
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(exc).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not YAML for us: it is nested too deeply") from None


class _OnceEach(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice", key.start_mark
                )
            seen.add(name)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def write_whole(path: Path, text: str) -> None:
    """Whoever reads `path` finds what was there before or all of `text`, whenever we are stopped.
    What is no file (a pipe, /dev/stdout) is written to. Raises `ConfigError`."""
    early: Path | None = None
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        early = path.with_name(f".{path.name}.{os.getpid()}")
        early.write_text(text, encoding="utf-8")
        early.replace(path)
    except OSError as exc:
        if early is not None:
            early.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from None
