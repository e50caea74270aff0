"""Hand-overs between processes, one of which is killed or stopped: never a wrong token."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.protocol.request import SamplingParams
from tests.helpers.engines import EngineProcess, Instance, address

PROMPT = [(5 * i * i + i) % 200 for i in range(120)]
LONG = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)


class Processes:
    def __init__(self, folder: Path, means: str) -> None:
        settings = {"kv_transfer": means, "num_blocks": 24}
        self.owner_process = EngineProcess(folder, "owner", **settings)
        self.receiver_process = EngineProcess(folder, "receiver", **settings)
        self.owner = Instance(address(folder, "owner"), "owner")
        self.receiver = Instance(address(folder, "receiver"), "receiver")

    def close(self) -> None:
        for instance in (self.owner, self.receiver):
            instance.close()
        for process in (self.owner_process, self.receiver_process):
            process.close()


@pytest.fixture(params=["map", "tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path, request.param)
    yield made
    made.close()


def test_the_owner_is_killed_while_its_pages_are_read(pair: Processes) -> None:
    expected = pair.owner.run("a", PROMPT, sampling=LONG)
    assert pair.receiver.fetch("b", PROMPT, pair.owner).num_blocks == len(PROMPT) // 16
    pair.receiver.submit("b", PROMPT, sampling=LONG)
    pair.receiver.until(lambda: bool(pair.receiver.rows.get("b")))
    pair.owner_process.close()
    assert pair.receiver.result("b") == expected
    # Who is asked now is not there; it is computed, after no longer than the bound.
    began_s = time.monotonic()
    gone = pair.owner.source(len(PROMPT) // 16)
    other = [PROMPT[0] + 1, *PROMPT[1:]]
    assert len(pair.receiver.run("c", other, kv_source=gone)) == 12
    assert time.monotonic() - began_s < 5.0 + 5.0  # and what computing takes on a busy machine


def test_a_receiver_that_stood_still_past_its_lease_says_nothing_wrong(pair: Processes) -> None:
    """It wakes up with windows that show other prompts by now."""
    expected = pair.owner.run("a", PROMPT, sampling=LONG)
    pair.receiver.fetch("b", PROMPT, pair.owner, lease_s=30.0)
    pair.receiver.submit("b", PROMPT, sampling=LONG)
    pair.receiver.until(lambda: bool(pair.receiver.rows.get("b")))
    pair.receiver_process.signal(signal.SIGSTOP)
    time.sleep(3.5)  # the lease is 3 s
    for i in range(6):  # fills the owner's pool of 24 blocks several times over
        other = [(3 * k * k + 11 * i + k) % 200 for k in range(120)]
        pair.owner.run(f"other{i}", other)
    pair.receiver_process.signal(signal.SIGCONT)
    assert pair.receiver.result("b") == expected


def test_a_killed_receiver_leaves_no_pins_in_the_way(pair: Processes) -> None:
    expected = pair.owner.run("a", PROMPT, sampling=LONG)
    pair.receiver.fetch("b", PROMPT, pair.owner, lease_s=30.0)
    pair.receiver_process.close()
    for i in range(6):  # pins of the dead do not stand in anybody's way for ever
        other = [(3 * k * k + 11 * i + k) % 200 for k in range(120)]
        assert len(pair.owner.run(f"other{i}", other)) == 12
    assert pair.owner.run("again", PROMPT, sampling=LONG) == expected
