"""Finding tags in text that comes in pieces. A tag begins with `<`."""

from __future__ import annotations

WHITESPACE = " \t\n\r"


def partial_tag(text: str, tags: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` that begins a tag without completing it."""
    longest = 0
    if "<" not in text[-max(map(len, tags)) :]:  # nearly always
        return 0
    for tag in tags:
        for length in range(min(len(tag) - 1, len(text)), longest, -1):
            if text.endswith(tag[:length]):
                longest = length
                break
    return longest


def undecided(text: str, tags: tuple[str, ...]) -> int:
    """Length of the suffix to hold back: white space, and what may become a tag after it.

    White space next to a tag belongs to the format rather than to the text, so it can only go out
    once something else follows.
    """
    settled = text[: len(text) - partial_tag(text, tags)].rstrip(WHITESPACE)
    return len(text) - len(settled)


def first_tag(text: str, tags: tuple[str, ...]) -> tuple[int, str]:
    """(position, tag) of the first tag in `text`; (-1, "") if there is none."""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    return min(found, default=(-1, ""))
