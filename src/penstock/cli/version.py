"""`penstock version`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from penstock import PROJECT, __version__
from penstock.cli.parser import Parser
from penstock.protocol.codec import PROTOCOL_VERSION

_LIBRARIES = ("torch", "tokenizers", "llguidance", "fastapi", "uvicorn", "pyzmq", "msgspec")


def run(arguments: list[str]) -> int:
    Parser("version", "Print the versions that a bug report should name.").parse(arguments)
    print(f"{PROJECT} {__version__} (protocol {PROTOCOL_VERSION})")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in _LIBRARIES:
        print(f"{name} {_version(name)}")
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
