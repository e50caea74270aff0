"""Logging of a process: to stderr, one line an event."""

from __future__ import annotations

import logging


def set_up(level: str, *, name: str) -> None:
    """`name` tells the processes of one server apart."""
    logging.basicConfig(
        level=level.upper(),
        format=f"%(asctime)s %(levelname)-7s [{name}] %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # They report each of our own requests.
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
