"""`penstock router MODEL`: the service alone, over instances that run elsewhere."""

from __future__ import annotations

from importlib import import_module

#: Over servers that are not ours; the rest is about instances of ours.
_FOREIGN = ("--engines",)


def run(arguments: list[str]) -> int:
    if any(word.partition("=")[0] in _FOREIGN for word in arguments):
        code = import_module("penstock.cli.router_foreign").run(arguments)
    else:
        code = import_module("penstock.cli.serve").run_router(arguments)
    assert isinstance(code, int)
    return code
