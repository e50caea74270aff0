"""Philox against the known-answer vectors published with Random123 (file kat_vectors)."""

import numpy as np
import pytest

from penstock.engine.sampling.philox import Purpose, philox4x32, uniforms

KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_rows_are_independent_of_the_batch_they_stand_in():
    seeds, choices, positions = np.arange(7) * 2**40, np.arange(7), np.arange(7) * 1000
    together = uniforms(seeds, choices, positions)
    alone = [float(uniforms(s, c, p)) for s, c, p in zip(seeds, choices, positions)]
    assert together.tolist() == alone


def test_every_part_of_the_address_matters():
    base = float(uniforms(2**35 + 1, 2, 3))
    others = [
        float(uniforms(2**35 + 2, 2, 3)),
        float(uniforms(2**36 + 1, 2, 3)),
        float(uniforms(2**35 + 1, 3, 3)),
        float(uniforms(2**35 + 1, 2, 4)),
        *(float(uniforms(2**35 + 1, 2, 3, purpose)) for purpose in list(Purpose)[1:]),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_uniform_in_the_unit_interval():
    drawn = uniforms(np.uint64(2**64 - 1), 0, np.arange(100_000))
    assert drawn.min() >= 0.0 and drawn.max() < 1.0
    counts, _ = np.histogram(drawn, bins=100, range=(0, 1))
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 160  # 99 degrees of freedom: p < 1e-4 beyond this
