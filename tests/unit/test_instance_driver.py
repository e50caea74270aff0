"""The instance's driver at its end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from penstock.engine.instance import InstanceDriver
from penstock.protocol.transport.open import listen
from penstock.trace import open_trace


class Runner:
    def launch(self, *_: Any) -> None: ...

    def close(self) -> None: ...


class Core:
    draining = False

    def on_timer(self, now: float) -> list[Any]:
        return []


def test_stopping_a_driver_that_has_just_ended_is_fine() -> None:
    core: Any = Core()
    driver = InstanceDriver(core, Runner())
    thread = threading.Thread(target=driver.run, args=(listen("memory://ends", "e"),))
    thread.start()
    driver.stop()
    thread.join(10)
    assert not thread.is_alive()
    driver.stop()  # the bell is gone by now
    driver.drain()


def test_the_last_step_is_in_the_trace(tmp_path: Path) -> None:
    trace = open_trace(str(tmp_path / "trace.json"), "engine-0")

    class Computing(Runner):
        def close(self) -> None:
            trace.add("the last step", 0.0, 1.0)

    core: Any = Core()
    driver = InstanceDriver(core, Computing(), trace=trace)
    driver.stop()
    driver.run(listen("memory://last-step", "e"))
    assert "the last step" in (tmp_path / "trace.json").read_text()
