"""Engine flags given to a service that starts no engine: some say what its instances must be, the
others are mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from penstock.cli.parser import Parser
from penstock.engine.config import EngineConfig
from penstock.protocol.errors import ConfigError
from penstock.service.cluster.fit import Wanted

#: What a service does itself by these: reads the tokenizer, seeds requests, writes a trace.
_OF_THE_SERVICE = ("model", "revision", "seed", "trace")


def wanted_of(parser: Parser, said: Mapping[str, Any]) -> Wanted:
    """Raises `ConfigError` for flags that say nothing of an instance somebody else has started."""
    names = [field.name for field in fields(Wanted)]
    idle = {f.name for f in fields(EngineConfig)} - {*names, *_OF_THE_SERVICE}
    flags: dict[str, str] = {}
    for action in parser._actions:
        if action.dest in idle & said.keys():
            flags.setdefault(action.dest, action.option_strings[0])
    if flags:
        listed = ", ".join(flags.values())
        raise ConfigError(
            f"{listed}: no engine is started here, so this would change nothing; give it to the "
            "`penstock worker`s"
        )
    return Wanted.among(said)
