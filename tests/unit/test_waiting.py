"""What instances are about to compute for those who wait there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES
from penstock.protocol.request import SamplingParams
from penstock.service import waiting as module
from penstock.service.generation import GenerationSpec
from penstock.service.journal import Entry
from penstock.service.waiting import Waiting

#: Keys are chained: where two agree, so does everything before them.
SHAPES = st.lists(st.integers(0, 2), max_size=5)


def packed(shape: list[int]) -> bytes:
    prefixes = [tuple(shape[: i + 1]) for i in range(len(shape))]
    return b"".join(repr(p).encode().ljust(KEY_BYTES, b" ")[-KEY_BYTES:] for p in prefixes)


def placed(number: int, instance: str) -> Entry:
    spec = GenerationSpec(
        request_id=f"r{number}", prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=5)
    )
    entry = Entry.of(spec, 0, 0.0)
    entry.instance = instance
    return entry


def leading(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other))
    )


@given(st.lists(st.tuples(SHAPES, st.sampled_from("abc"), st.booleans()), max_size=30), SHAPES)
def test_the_newest_at_each_instance_say_what_will_be_there(
    arrivals: list[tuple[list[int], str, bool]], asked: list[int]
) -> None:
    waiting = Waiting()
    left: dict[str, list[list[int]]] = {}
    for number, (shape, instance, leaves) in enumerate(arrivals):
        entry = placed(number, instance)
        waiting.add(entry, packed(shape))
        if leaves:
            entry.instance = None
            waiting.remove(entry)
            waiting.remove(entry)
        elif shape and asked and shape[0] == asked[0]:
            left.setdefault(instance, []).append(shape)
    assert waiting.soon_there(packed(asked)) == {
        instance: BLOCK_TOKENS * max(leading(shape, asked) for shape in shapes[-8:])
        for instance, shapes in left.items()
    }


def test_only_so_many_are_looked_at() -> None:
    class Counted(bytes):
        looks = 0

        def __getitem__(self, at: object) -> bytes:  # type: ignore[override]
            Counted.looks += 1
            return super().__getitem__(at)  # type: ignore[call-overload,no-any-return]

    waiting = Waiting()
    for number in range(1000):
        waiting.add(placed(number, "a"), Counted(packed([0, 1])))
    Counted.looks = 0
    assert waiting.soon_there(packed([0, 1])) == {"a": 2 * BLOCK_TOKENS}
    assert 0 < Counted.looks <= 4 * module._LOOKED_AT
