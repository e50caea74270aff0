"""Stop strings, against a search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.protocol.errors import InvalidRequest
from penstock.service.text.stops import StopChecker


def naive(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The stop string that ends first; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            hit = max(hits, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


def chunked(text: str, cuts: list[int]) -> list[str]:
    parts, position = [], 0
    for cut in cuts:
        parts.append(text[position : position + cut])
        position += cut
    return [*parts, text[position:]]


# Two letters, so that stop strings overlap themselves and each other all the time.
letters = st.text("ab", max_size=30)
stop_sets = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)
cut_lists = st.lists(st.integers(0, 4), max_size=20)


@given(text=letters, stops=stop_sets, cuts=cut_lists, include=st.booleans())
def test_the_result_is_that_of_a_whole_search(text, stops, cuts, include) -> None:
    checker = StopChecker(stops, include)
    sent = ""
    for part in chunked(text, cuts):
        emitted, hit = checker.push(part)
        sent += emitted
        if hit is not None:
            break
    sent += checker.flush()
    assert (sent, checker.hit) == naive(text, stops, include)


@given(text=letters, stops=stop_sets)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text, stops) -> None:
    checker = StopChecker(stops)
    sent = ""
    for length, char in enumerate(text, 1):
        emitted, hit = checker.push(char)
        sent += emitted
        if hit is not None:
            return
        held = text[len(sent) : length]
        begins = [
            text[start:length]
            for start in range(length)
            if any(stop.startswith(text[start:length]) for stop in stops)
        ]
        assert held == max(begins, key=len, default="")


def test_characters_with_a_meaning_in_regular_expressions() -> None:
    for stop in ("]", "^", "-", "\\", "\n\n", "[a-z]", "é", "😀"):
        checker = StopChecker((stop,))
        assert checker.push("xy" + stop + "z") == ("xy", stop)


def test_after_a_hit_nothing_more_comes() -> None:
    checker = StopChecker(("end",))
    assert checker.push("the e") == ("the ", None)
    assert checker.push("nd of it") == ("", "end")
    assert checker.push("more") == ("", "end")
    assert checker.flush() == ""


@pytest.mark.parametrize("stops", [("",), ("a", ""), ()])
def test_empty_stop_strings_are_refused(stops: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest):
        StopChecker(stops)
