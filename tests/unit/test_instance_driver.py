"""The instance's driver at its end."""

from __future__ import annotations

import threading
from typing import Any

from penstock.engine.instance import InstanceDriver
from penstock.protocol.transport.open import listen


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
