"""`python -m penstock.simulator.storms`: what it plays, and what people get wrong."""

from __future__ import annotations

import pytest

from penstock.simulator.storms.__main__ import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["abc"], "'abc' is neither a seed nor like 0-999"),
        (["9-1"], "'9-1' is neither a seed"),
        (["1-"], "'1-' is neither a seed"),
        (["5", "--only", "x"], "'x' is not like 0,2"),
        (["5", "--only", "99"], "--only 99: the faults of this storm are 0 to"),
        (["5", "--until", "x"], "invalid float value: 'x'"),
    ],
)
def test_what_people_get_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_seeds_are_played(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["3-4"]) == 0
    assert "2 storms, 0 failed" in capsys.readouterr().out
    assert main(["3", "--only", ""]) == 0
    said = capsys.readouterr().out
    assert "Storm(" in said and "1 storms, 0 failed" in said
    for kind in ("Crash(", "Cut(", "Halt(", "Slow("):
        assert kind not in said
