"""Engines that an operator takes out of service, and brings back."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_service_core import Bench, load

from penstock.protocol.effects import Effect
from penstock.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.protocol.instance import Attach, Drain
from penstock.service.cluster.fleet import Fleet
from penstock.service.cluster.roster import FolderRoster, LocalRoster, NobodyHere, Roster
from penstock.service.config import RestartPolicy
from penstock.service.operations import Conflict, CoreOperations, NotHere


class Site:
    """A service over instances that the roster owns."""

    def __init__(self, *names: str, roster: Roster | None = None) -> None:
        self.bench = Bench(*names)
        self.roster = roster or LocalRoster()
        self.reconnected: list[str] = []
        self.operations = CoreOperations(
            self.bench.core, self._take, lambda: self.bench.now, self.roster, self._reconnect
        )

    def _take(self, effects: list[Effect]) -> None:
        self.bench._take(effects)

    def _reconnect(self, name: str) -> None:
        self.reconnected.append(name)

    def state(self, name: str) -> str:
        return self.bench.core.instances[name].state

    def ends(self, name: str) -> None:
        """Its process has ended, and whoever owned it says so."""
        self.roster.gone(name)
        self.operations.follow_roster()

    def lost(self, name: str) -> None:
        self._take(self.bench.core.on_instance_lost(name, self.bench.now))

    def sent(self, name: str, kind: type) -> list[Any]:
        return [m for to, m in self.bench.sent if to == name and isinstance(m, kind)]


def test_drained_and_started_again() -> None:
    site = Site("a", "b")
    site.operations.drain("a")
    assert site.sent("a", Drain) and not site.bench.core.instances["a"].takes_work
    site.bench.say("a", load("a", 1))
    with pytest.raises(Conflict, match="still drains"):
        site.operations.start("a")
    site.ends("a")
    assert site.state("a") == "drained" and site.bench.core.ready
    assert site.bench.core.instances["a"].load is None
    site.operations.drain("a")  # says nothing new
    # Nobody knocks there any more.
    site.bench.sent.clear()
    site.bench.now = 60.0
    site._take(site.bench.core.on_timer(60.0))
    assert site.state("a") == "drained" and not site.sent("a", Attach)
    site.operations.start("a")
    assert site.state("a") == "connecting" and site.reconnected == ["a"]
    site._take(site.bench.core.on_timer(61.0))
    assert site.sent("a", Attach)
    site.bench.attached("a", incarnation=2)
    assert site.state("a") == "active" and site.bench.core.instances["a"].takes_work
    with pytest.raises(Conflict, match="a is active"):
        site.operations.start("a")


def test_the_last_one_stays() -> None:
    site = Site("a", "b", "c")
    for name in ("a", "b"):
        site.operations.drain(name)
    with pytest.raises(Conflict, match="no other instance takes work: without c"):
        site.operations.drain("c")
    assert site.bench.core.instances["c"].takes_work
    site.ends("a")
    site.operations.start("a")
    with pytest.raises(Conflict):
        site.operations.drain("c")  # a is not there yet
    site.bench.attached("a", incarnation=2)
    site.operations.drain("c")
    for order in (site.operations.drain, site.operations.start):
        with pytest.raises(NotHere):
            order("nobody")


def test_silence_is_no_end() -> None:
    site = Site("a", "b")
    site.operations.drain("a")
    site.lost("a")
    with pytest.raises(Conflict, match="still drains"):
        site.operations.start("a")
    site.ends("a")
    assert site.state("a") == "drained"


def test_an_engine_that_comes_up_all_the_same_is_told_to_go() -> None:
    site = Site("a", "b")
    site.lost("a")
    site.operations.drain("a")
    assert site.state("a") == "lost"
    site.bench.sent.clear()
    site.bench.attached("a", incarnation=2)  # it was on its way when the order came
    site.operations.follow_roster()
    assert site.sent("a", Drain) and not site.bench.core.instances["a"].takes_work


def test_engines_of_others_are_let_go_and_started_by_others() -> None:
    site = Site("a", roster=NobodyHere())
    site.operations.drain("a")
    assert site.sent("a", Drain)
    site.lost("a")
    assert site.state("a") == "lost"  # a successor of this name is welcome
    with pytest.raises(UnsupportedFeature, match="was started elsewhere"):
        site.operations.start("a")


def test_an_order_to_one_worker_is_known_to_all(tmp_path: Path) -> None:
    first, second = (Site("a", "b", roster=FolderRoster(tmp_path)) for _ in range(2))
    first.operations.drain("a")
    with pytest.raises(Conflict):
        second.operations.drain("b")
    second.operations.follow_roster()
    assert not second.bench.core.instances["a"].takes_work
    first.roster.gone("a")
    for site in (first, second):
        site.operations.follow_roster()
        assert site.state("a") == "drained"
    late = Site("a", "b", roster=FolderRoster(tmp_path))  # a worker that was started again
    for _ in range(2):
        late.operations.follow_roster()
    assert late.state("a") == "drained"
    second.operations.start("a")
    first.operations.follow_roster()
    assert first.state("a") == second.state("a") == "connecting"


def test_of_orders_at_once_one_is_too_many(tmp_path: Path) -> None:
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        refused: list[str] = []
        barrier = threading.Barrier(3)

        def order(name: str, folder: Path, refused: list[str], barrier: threading.Barrier) -> None:
            site = Site("a", "b", "c", roster=FolderRoster(folder))
            barrier.wait(10)
            try:
                site.operations.drain(name)
            except Conflict:
                refused.append(name)

        threads = [
            threading.Thread(target=order, args=(name, folder, refused, barrier)) for name in "abc"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(refused) == 1


# --- processes ---------------------------------------------------------------------------------


class Owner:
    """A fleet of processes that wait, and end well when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: str, num: int = 2) -> None:
        from penstock.service.cluster import supervisor

        popen = supervisor.subprocess.Popen

        def start(command: list[str], **given: Any) -> Any:
            return popen([sys.executable, "-c", script], **given)

        monkeypatch.setattr(supervisor.subprocess, "Popen", start)
        self.roster = LocalRoster()
        self.ended: list[tuple[str, bool]] = []
        self.failed: list[str] = []
        self.drained: list[str] = []
        self.fleet = Fleet(
            num,
            (),
            RestartPolicy(),
            on_ended=lambda name, again: self.ended.append((name, again)),
            on_failed=self.failed.append,
            on_drained=self.drained.append,
            roster=self.roster,
        )
        self.roster.on_change = self.fleet.follow_roster
        self.fleet.start()
        for name in self.fleet.workers:
            self.fleet.ready(name)

    def pid(self, name: str) -> int | None:
        return self.fleet.workers[name].pid


async def until(what: Any) -> None:
    for _ in range(1000):
        if what():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


WAITS = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0)); signal.pause()"


async def test_a_drained_process_is_not_started_again_until_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = Owner(monkeypatch, "import sys; sys.stdin.read()")  # ends well at once
    worker = owner.fleet.workers["engine-0"]
    owner.roster.take_out("engine-0")
    await until(lambda: owner.drained == ["engine-0"])
    assert worker.rests and owner.failed == []
    starts = worker.incarnation
    await asyncio.sleep(0.1)
    assert worker.incarnation == starts
    owner.roster.bring_back("engine-0")
    assert not worker.rests and worker.incarnation == starts + 1
    await owner.fleet.stop(5.0)


async def test_one_that_waits_to_be_started_again_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(monkeypatch, WAITS)
    worker = owner.fleet.workers["engine-0"]
    monkeypatch.setattr(worker, "_delay_s", lambda: 60.0)
    worker.kill()
    await until(lambda: owner.ended == [("engine-0", True)])
    owner.roster.take_out("engine-0")
    assert owner.drained == ["engine-0"] and owner.roster.has_gone("engine-0")
    owner.roster.bring_back("engine-0")
    assert worker.incarnation == 2 and not worker.rests
    await owner.fleet.stop(5.0)


async def test_one_that_was_given_up_is_started_by_an_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = Owner(monkeypatch, WAITS, num=2)
    given_up, other = owner.fleet.workers.values()
    monkeypatch.setattr(given_up, "_policy", RestartPolicy(enabled=False))
    monkeypatch.setattr(other, "_policy", RestartPolicy(enabled=False))
    given_up.kill()
    await until(lambda: owner.ended == [("engine-0", False)])
    owner.roster.take_out("engine-0")
    assert owner.drained == ["engine-0"]
    owner.roster.bring_back("engine-0")
    assert given_up.running
    other.kill()
    await until(lambda: len(owner.ended) == 2)
    assert owner.failed == []  # the first one is there
    given_up.kill()
    await until(lambda: owner.failed)
    await owner.fleet.stop(5.0)


async def test_however_it_ends_a_drained_engine_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = Owner(monkeypatch, WAITS)
    owner.roster.take_out("engine-1")
    owner.fleet.workers["engine-1"].kill()
    await until(lambda: owner.drained == ["engine-1"])
    assert owner.failed == [] and owner.ended == []
    await owner.fleet.stop(5.0)


async def test_one_that_drains_in_silence_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(monkeypatch, WAITS)
    owner.roster.take_out("engine-0")
    pids = {name: owner.pid(name) for name in owner.fleet.workers}
    for name in pids:
        owner.fleet.kill_unless(name, lambda: False, 0.05)
    await until(lambda: owner.ended == [("engine-1", True)])
    assert owner.pid("engine-0") == pids["engine-0"] and not owner.fleet.workers["engine-0"].rests
    await owner.fleet.stop(5.0)


async def test_one_that_does_not_end_is_ended_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.service.cluster import fleet

    monkeypatch.setattr(fleet, "_ENDS_WITHIN_S", 0.2)
    owner = Owner(monkeypatch, WAITS)
    owner.roster.take_out("engine-0")
    owner.fleet.kill_unless("engine-0", lambda: False, 0.05)
    await until(lambda: owner.drained == ["engine-0"])
    await owner.fleet.stop(5.0)


def test_scaled_down_and_up_by_number() -> None:
    site = Site("a", "b", "c")
    done = site.operations.scale(3)
    assert (done.drained, done.started) == ([], [])
    done = site.operations.scale(1)
    assert done.drained == ["c", "b"] and site.bench.core.instances["a"].takes_work
    with pytest.raises(Conflict, match="still drain"):
        site.operations.scale(3)
    site.ends("b")
    site.ends("c")
    done = site.operations.scale(2)
    assert (done.drained, done.started) == ([], ["b"])
    assert site.reconnected == ["b"]


@pytest.mark.parametrize("wanted", [0, -1, 3])
def test_scaled_to_what_there_is(wanted: int) -> None:
    with pytest.raises(InvalidRequest, match="from 1 to 2"):
        Site("a", "b").operations.scale(wanted)


def test_engines_of_others_are_not_scaled() -> None:
    with pytest.raises(UnsupportedFeature, match="started here"):
        Site("a", "b", roster=NobodyHere()).operations.scale(1)
