"""Processes killed at bad moments, and machines that lack something."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from penstock.protocol.errors import StartupError
from penstock.service.cluster.roster import LocalRoster
from penstock.service.cluster.supervisor import Worker
from penstock.service.config import RestartPolicy
from tests.chaos.test_attacks import body, complete, settle
from tests.helpers import raw_http
from tests.helpers.server import Server, environment, free_port, penstock, running

FLAGS = ("--dtype", "float32", "--served-model-name", "m", "--kv-cache-memory-bytes", "16M")
TYPED = {"engine_unavailable", "engine_failed"}


async def ends_of(port: int, number: int, **more: object) -> list[str]:
    """All ends of a streamed request, whatever their kind; its tokens are checked for doubles."""
    data = body(stream=True, prompt=[number % 300 + 5] * 5, max_tokens=60, logprobs=0) | more
    answer = await raw_http.request(port, "/v1/completions", data)
    if answer.status != 200:
        return [answer.json["error"]["code"]]
    ends, num_tokens = [], 0
    for event in answer.events:
        if "error" in event:
            ends.append(event["error"]["code"])
            continue
        for choice in event["choices"]:
            if choice["logprobs"]:
                num_tokens += len(choice["logprobs"]["tokens"])
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert ends != ["length"] or num_tokens == data["max_tokens"]
    return ends


async def wait_dead(process: psutil.Process, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, f"{process} still runs"
        await asyncio.sleep(0.02)


async def next_engine(
    server: Server, dead: psutil.Process, timeout_s: float = 20.0
) -> psutil.Process:
    deadline_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(server.process.pid).children():
                if child.pid != dead.pid and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        assert time.monotonic() < deadline_s, server.log[-2000:]
        await asyncio.sleep(0.02)


# --- the engine dies -----------------------------------------------------------------------------


@pytest.mark.slow
async def test_five_deaths_in_a_row_under_load(checkpoint: str) -> None:
    with running(checkpoint, *FLAGS) as server:
        stop = asyncio.Event()
        all_ends: list[list[str]] = []

        async def client(number: int) -> None:
            while not stop.is_set():
                all_ends.append(await ends_of(server.port, number, max_tokens=200))

        clients = [asyncio.create_task(client(i)) for i in range(8)]
        for _ in range(5):
            await asyncio.sleep(0.3)
            engine = server.engine()
            engine.kill()
            await next_engine(server, engine)
            await asyncio.to_thread(server.wait_ready)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*clients), 100.0)
        assert len(all_ends) >= 8
        assert all(len(ends) == 1 for ends in all_ends), all_ends
        assert {ends[0] for ends in all_ends} <= {"length"} | TYPED
        assert ["length"] in all_ends
        settle(server)


@pytest.mark.slow
async def test_killed_again_while_it_starts(checkpoint: str) -> None:
    with running(checkpoint, *FLAGS) as server:
        waiting = [asyncio.create_task(ends_of(server.port, i, max_tokens=400)) for i in range(6)]
        await asyncio.sleep(0.1)
        engine = server.engine()
        engine.kill()
        for delay_s in (0.0, 0.3):  # just forked; importing
            engine = await next_engine(server, engine)
            await asyncio.sleep(delay_s)
            engine.kill()
            # What comes meanwhile waits, too.
            waiting.append(asyncio.create_task(ends_of(server.port, 7)))
        ends = await asyncio.wait_for(asyncio.gather(*waiting), 100.0)
        assert ends == [["length"]] * len(waiting)
        settle(server)


async def test_an_engine_that_keeps_dying_ends_the_service_with_a_reason(checkpoint: str) -> None:
    with running(checkpoint, *FLAGS, ready=False) as server:
        engine: psutil.Process = psutil.Process()
        engine = await next_engine(server, engine)
        engine.kill()
        assert await asyncio.to_thread(server.process.wait, 30) == 1
        assert "did not start" in server.log and "Traceback" not in server.log


@pytest.mark.slow
async def test_sigterm_while_the_engine_is_dead(checkpoint: str) -> None:
    """It comes back, what runs is finished, and only then the service ends."""
    with running(checkpoint, *FLAGS) as server:
        waiting = [asyncio.create_task(ends_of(server.port, i, max_tokens=400)) for i in range(4)]
        await asyncio.sleep(0.1)
        server.engine().kill()
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(asyncio.gather(*waiting), 100.0) == [["length"]] * 4
        assert await asyncio.to_thread(server.process.wait, 20) == 0


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM] * 2, [signal.SIGINT] * 2])
async def test_signals(checkpoint: str, signals: list[signal.Signals]) -> None:
    with running(checkpoint, *FLAGS) as server:
        engine = server.engine()
        folder = socket_folder(engine)
        # Enough to be under way still when the signal comes, on a fast machine too.
        tasks = [
            asyncio.create_task(ends_of(server.port, i, max_tokens=480, n=16)) for i in range(8)
        ]
        while not await asyncio.to_thread(server.metric, "penstock:num_requests_running"):
            await asyncio.sleep(0.01)
        assert not all(task.done() for task in tasks)
        for each in signals:
            server.process.send_signal(each)
            await asyncio.sleep(0.1)
        ends = await asyncio.wait_for(asyncio.gather(*tasks), 100.0)
        # The first finishes what runs, the second does not wait for it; nobody is left unanswered.
        if len(signals) == 1:
            assert ends == [["length"] * 16] * 8
        else:
            assert all(each and set(each) <= {"length"} | TYPED for each in ends)
            assert any(set(each) & TYPED for each in ends)
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        await wait_dead(engine)
        assert not folder.exists()
        assert "Traceback" not in server.log


@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.5, 1.0, 1.5])
async def test_sigterm_while_starting(checkpoint: str, delay_s: float, tmp_path: Path) -> None:
    with running(checkpoint, *FLAGS, ready=False, env={"TMPDIR": str(tmp_path)}) as server:
        await asyncio.sleep(delay_s)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(server.process.wait, 20)
        assert code in (0, -signal.SIGTERM), server.log
        for child in children:
            await wait_dead(child)
        assert "Traceback" not in server.log, server.log


async def test_in_process(checkpoint: str) -> None:
    with running(checkpoint, *FLAGS, "--in-process") as server:
        assert not psutil.Process(server.process.pid).children()
        task = asyncio.create_task(ends_of(server.port, 1, max_tokens=480))
        assert await complete(server.port) == "length"
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(task, 100.0) == ["length"]
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert "Traceback" not in server.log, server.log


# --- what is left behind -------------------------------------------------------------------------


def socket_folder(engine: psutil.Process) -> Path:
    line = engine.cmdline()
    return Path(line[line.index("--address") + 1].removeprefix("ipc://")).parent


@pytest.fixture
def temp() -> Iterator[Path]:
    """pytest's own have names that are too long for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
async def test_the_next_start_tidies_up_after_a_killed_one(checkpoint: str, temp: Path) -> None:
    env = {"TMPDIR": str(temp)}
    with running(checkpoint, *FLAGS, env=env) as alive:
        with running(checkpoint, *FLAGS, env=env) as killed:
            engine = killed.engine()
            left = socket_folder(engine)
            killed.process.kill()
            killed.process.wait()
            await wait_dead(engine)
        assert left.exists()
        with running(checkpoint, *FLAGS, env=env) as third:
            assert not left.exists()
            # Those of living servers are theirs.
            assert await complete(alive.port) == "length"
            assert await complete(third.port) == "length"
            assert len(list(temp.glob("penstock-*"))) == 2
            assert all(stat.S_IMODE(f.stat().st_mode) == 0o700 for f in temp.glob("penstock-*"))
    assert not list(temp.glob("penstock-*"))


# --- addresses -----------------------------------------------------------------------------------


def start(model: str, *flags: str, timeout_s: float = 60.0, **env: str) -> tuple[int, str]:
    """A server that is expected not to start: its exit code and what it said."""
    done = subprocess.run(
        penstock("serve", model, *FLAGS, *flags), env=environment(**env), capture_output=True,
        text=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stderr + done.stdout


async def test_two_servers_on_one_port(checkpoint: str) -> None:
    with running(checkpoint, *FLAGS) as server:
        code, said = await asyncio.to_thread(start, checkpoint, "--port", str(server.port))
        assert code == 2 and f"port {server.port}" in said and "Traceback" not in said
        assert await complete(server.port) == "length"


async def test_two_servers_on_one_unix_socket(checkpoint: str, tmp_path: Path) -> None:
    uds = tmp_path / "api.sock"
    with running(checkpoint, *FLAGS, "--uds", str(uds), ready=False) as server:
        transport = httpx.AsyncHTTPTransport(uds=str(uds))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await until_ready(client, server)
            code, said = await asyncio.to_thread(start, checkpoint, "--uds", str(uds))
            assert code == 2 and str(uds) in said and "Traceback" not in said, said
            assert (await client.get("/health")).status_code == 200
        server.process.terminate()
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert not uds.exists()


async def test_a_unix_socket_that_a_dead_server_left(checkpoint: str, tmp_path: Path) -> None:
    uds = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(uds))
    with running(checkpoint, *FLAGS, "--uds", str(uds), ready=False) as server:
        transport = httpx.AsyncHTTPTransport(uds=str(uds))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await until_ready(client, server)


async def until_ready(client: httpx.AsyncClient, server: Server) -> None:
    deadline_s = time.monotonic() + 60.0
    while True:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/health")).status_code == 200:
                return
        assert time.monotonic() < deadline_s and server.process.poll() is None, server.log
        await asyncio.sleep(0.05)


def test_a_file_in_the_place_of_a_unix_socket_is_not_deleted(
    checkpoint: str, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("not a socket")
    code, said = start(checkpoint, "--uds", str(precious))
    assert code == 2 and str(precious) in said and "Traceback" not in said
    assert precious.read_text() == "not a socket"
    code, said = start(checkpoint, "--uds", str(tmp_path / "nowhere" / "api.sock"))
    assert code == 2 and "nowhere" in said and "Traceback" not in said
    code, said = start(checkpoint, "--uds", str(tmp_path / ("x" * 120)))
    assert code == 2 and "Traceback" not in said


# --- a machine that lacks something --------------------------------------------------------------


async def test_a_temporary_folder_with_a_very_long_name(checkpoint: str, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with running(checkpoint, *FLAGS, env={"TMPDIR": str(long)}) as server:
        assert await complete(server.port) == "length"


def test_no_temporary_folder_at_all(checkpoint: str, tmp_path: Path) -> None:
    """tempfile tries several; here each says that it is full."""
    (tmp_path / "sitecustomize.py").write_text(
        "import tempfile\n"
        "def full(*a, **k): raise OSError(28, 'No space left on device')\n"
        "tempfile.mkdtemp = full\n"
    )
    code, said = start(checkpoint, "--port", str(free_port()), PYTHONPATH=_path(tmp_path))
    assert code != 0 and "No space left" in said and "Traceback" not in said, said


def _path(first: Path) -> str:
    return os.pathsep.join((str(first), environment()["PYTHONPATH"]))


@pytest.mark.slow  # the kernels are compiled, and cannot be kept
@pytest.mark.timeout(600)
async def test_a_full_disk_under_everything_that_is_written(
    checkpoint: str, tmp_path: Path
) -> None:
    """A tiny file system for temporary files and for compiled kernels: slower, but served."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tiny)])
    if mounted.returncode != 0:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        with contextlib.suppress(OSError):
            (tiny / "filler").write_bytes(bytes(1 << 20))
        env = {"TMPDIR": str(tiny), "PENSTOCK_CACHE": str(tiny / "cache")}
        with running(checkpoint, *FLAGS, env=env, ready=False) as server:
            server.wait_ready(400.0)
            assert await complete(server.port) == "length"
            assert "Traceback" not in server.log, server.log
    finally:  # a compiler may still be at it
        subprocess.run(["umount", "--lazy", str(tiny)], check=True)


@pytest.mark.slow
async def test_a_clock_that_jumps(checkpoint: str, tmp_path: Path) -> None:
    """Wall-clock time decides nothing: here each look at it is years from the one before."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time, random\n"
        "_real = time.time\n"
        "time.time = lambda: _real() + random.uniform(-3e8, 3e8)\n"
    )
    with running(checkpoint, *FLAGS, env={"PYTHONPATH": _path(tmp_path)}) as server:
        engine = server.engine()
        ends = await asyncio.gather(*(ends_of(server.port, i) for i in range(8)))
        assert ends == [["length"]] * 8
        await asyncio.sleep(4.0)  # longer than an instance may be silent
        assert server.engine().pid == engine.pid
        assert await complete(server.port) == "length"
        for word in ("Traceback", "lost", "suspect"):
            assert word not in server.log, server.log


@pytest.mark.slow
async def test_few_file_descriptors(checkpoint: str) -> None:
    """More clients than files: those that fit are served, the others wait or are turned away."""
    with running(checkpoint, *FLAGS, limits={resource.RLIMIT_NOFILE: 64}) as server:
        crowd = []
        for _ in range(100):
            with contextlib.suppress(OSError):
                crowd.append(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        await asyncio.sleep(0.5)
        assert server.process.poll() is None
        for each in crowd:
            each.close()
        server.wait_ready(30.0)
        assert await complete(server.port) == "length"
        # An engine can still be started again.
        engine = server.engine()
        engine.kill()
        await next_engine(server, engine)
        assert await complete(server.port) == "length"


@pytest.mark.parametrize("limit_mib", [600, 900])
def test_too_little_memory_to_start(checkpoint: str, tmp_path: Path, limit_mib: int) -> None:
    """Some libraries say so by themselves; none of it is a traceback, or success."""
    address = f"ipc://{tmp_path}/engine.sock"
    done = subprocess.run(
        penstock("worker", checkpoint, "--address", address), env=environment(),
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_mib << 20,) * 2),
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    assert "memory" in done.stderr, done.stderr


@pytest.mark.slow
async def test_memory_that_runs_out_while_serving(checkpoint: str) -> None:
    """The engine may take nothing more: each request ends with tokens or an error."""
    with running(checkpoint, *FLAGS) as server:
        engine = server.engine()
        engine.rlimit(psutil.RLIMIT_AS, (64 << 20,) * 2)
        data = {
            "prompt": [[7 + i] * 480 for i in range(8)],
            "max_tokens": 8,
            "n": 8,
            "prompt_logprobs": 5,
            "stream": False,
        }
        answers = await asyncio.wait_for(
            asyncio.gather(
                *(raw_http.request(server.port, "/v1/completions", body(**data)) for _ in range(16))
            ),
            60.0,
        )
        for answer in answers:
            assert answer.status == 200 or answer.json["error"]["code"] in TYPED, answer
        assert "failed" in server.log or "is lost" in server.log, "there was enough memory"
        settle(server)
        assert await complete(server.port) in {"length"} | TYPED


async def test_no_processes_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[str, int, bool]] = []
    policy = RestartPolicy(max_delay_s=0.01)
    worker = Worker(
        "w", (), policy, lambda *end: ends.append(end), LocalRoster(), lambda name: None
    )
    real, failures = subprocess.Popen, 0

    def popen(_: list[str], **options: object) -> subprocess.Popen[bytes]:
        if failures:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return real([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    try:
        failures = 1
        with pytest.raises(StartupError, match="temporarily"):
            worker.start()
        failures = 0
        worker.start()
        worker.ready()
        first = worker.pid
        failures = 1
        worker.kill()
        deadline_s = time.monotonic() + 20.0
        while len(ends) < 3:
            assert time.monotonic() < deadline_s, ends
            await asyncio.sleep(0.01)
        failures = 0
        while worker.pid == first:
            assert time.monotonic() < deadline_s, ends
            await asyncio.sleep(0.01)
        assert all(again for _, _, again in ends)
    finally:
        await worker.stop(5.0)
