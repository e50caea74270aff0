"""English prose from a gzipped JSON-lines file: one work a line, with `split` and `text`."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path


def load_books(path: Path, split: str) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        works = [json.loads(line) for line in lines]
    return [work["text"] for work in works if work["split"] == split]


def sentences_of(books: list[str], per_book: int = 400) -> list[str]:
    """Single sentences of a sensible length, as things that somebody might say."""
    found: list[str] = []
    for book in books:
        pieces = re.split(r"(?<=[.!?])\s+", book)
        fit = [" ".join(piece.split()) for piece in pieces if 12 <= len(piece) <= 110]
        found += fit[:: max(1, len(fit) // per_book)]
    return found
