"""What all tests share."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

# Before torch is imported: tiny models are slower on many threads, and the machine is shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach out; a test that needs a model makes it or uses the carried one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.helpers.processes import Processes

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that a test runs in this process say what is logged; the next test is not theirs."""
    loggers = [logging.getLogger(), logging.getLogger("penstock")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    """Processes that a test starts, in its own folder."""
    from tests.helpers.processes import processes

    with processes(tmp_path) as found:
        yield found


#: After a timeout: until whoever has swallowed it, or hangs while cleaning up, is told again.
_AGAIN_S = 30.0
_TEARDOWN_S = 60.0
_in_a_phase = False
_handler = pytest.StashKey[Any]()


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Iterator[None]:
    """A timeout is raised in whatever runs at that moment. That may be some background task of a
    loop, which takes it to its grave while the test waits on: so it is raised again. And only where
    pytest reports what is raised, for elsewhere it would end the whole run."""
    result = yield
    handler = signal.getsignal(signal.SIGALRM)
    delay_s, interval_s = signal.getitimer(signal.ITIMER_REAL)
    if not callable(handler) or not delay_s or interval_s:
        return result  # the other method, which ends the process

    def raise_where_it_is_seen(number: int, frame: FrameType | None) -> None:
        if _in_a_phase:
            handler(number, frame)

    item.stash[_handler] = raise_where_it_is_seen
    _arm(item, delay_s)
    return result


def _arm(item: pytest.Item, delay_s: float) -> None:
    if _handler in item.stash:
        signal.signal(signal.SIGALRM, item.stash[_handler])
        signal.setitimer(signal.ITIMER_REAL, delay_s, _AGAIN_S)


@contextlib.contextmanager
def _a_phase() -> Iterator[None]:
    global _in_a_phase
    _in_a_phase = True
    try:
        yield
    finally:
        _in_a_phase = False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup() -> Iterator[None]:
    with _a_phase():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call() -> Iterator[None]:
    with _a_phase():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        _arm(item, _TEARDOWN_S)  # pytest-timeout takes its timer back when a test fails
    with _a_phase():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """A failure's report parses sources. Were garbage collected in the middle, a task in it with an
    exception that nobody has seen would have its traceback formatted, which parses too, and CPython
    3.11's parser is not made for that: "AST constructor recursion depth mismatch" would end the
    run (python/cpython#106905)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if enabled:
            gc.enable()
