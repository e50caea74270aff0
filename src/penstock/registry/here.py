"""Where this process stands: its host's names, and the address under which others reach it."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit


def boot_id() -> str:
    """The same for all processes of a running host, its containers included; "" where it is not
    told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def address_towards(registry_url: str) -> str:
    """This host's IP address on the way to the registry: 127.0.0.1 where that is here."""
    scheme, _, rest = registry_url.partition("://")
    where = rest.partition("/")[0].rpartition("@")[2].split(",")[0]
    host = urlsplit(f"//{where}").hostname
    if scheme in ("memory", "penstock+ipc") or not host:
        return "127.0.0.1"
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: only asks for the route
        found = str(probe.getsockname()[0])
    return f"[{found}]" if ":" in found else found


def reachable(bound: str, registry_url: str) -> str:
    """The address to register for a listener bound to `bound`, which may be every interface."""
    for everywhere in ("tcp://0.0.0.0:", "tcp://[::]:"):
        if bound.startswith(everywhere):
            return f"tcp://{address_towards(registry_url)}:{bound.removeprefix(everywhere)}"
    return bound
