"""`penstock top`: what it shows, at what width, and what it does with servers that are none."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.helpers.cluster_reports import report
from tests.helpers.server import environment, free_port, penstock

from penstock.cli.main import main
from penstock.cli.top_view import view
from penstock.service.report import ClusterReport, InstanceReport

ANSWER = msgspec.json.encode(report())


def drawn(found: ClusterReport | None, width: int, trouble: str = "") -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(view(found, "http://h:1", trouble, [1.0, 2.0, 0.0], width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 40, 80, 100, 132, 200, 300])
@pytest.mark.parametrize("num_instances", [0, 1, 5, 64])
def test_every_line_fits(width: int, num_instances: int) -> None:
    lines = drawn(report(num_instances), width)
    if width >= 60:
        assert max(map(cell_len, lines)) <= width
        assert len(lines) <= num_instances + 9


def test_what_an_operator_looks_for_is_there_at_80_columns() -> None:
    text = "\n".join(drawn(report(), 80))
    for wanted in (
        "slo-aware", "12 req/s", "1 834 tok/s", "3 waiting", "37 running", "97% in", "SLO 500ms",
        "engine-0", "P→D", "draining", "suspect", "lost", "connecting", "36%",
    ):  # fmt: skip
        assert wanted in text


def test_a_wide_terminal_shows_more() -> None:
    text = "\n".join(drawn(report(), 220))
    for wanted in ("host", "disk", "pred", "turns", "tcp://10.0.0.1:7000", "leader router-0"):
        assert wanted in text


def test_an_engine_of_others_says_little_and_is_shown() -> None:
    found = report(0, instances=[InstanceReport(name="http://a:8000", state="active")])
    assert any("http://a:8000" in line and "active" in line for line in drawn(found, 80))


def test_refusals_and_reasons_are_shown() -> None:
    found = report(1, ready=False, reason="nothing attached")
    assert "nothing attached" in "\n".join(drawn(found, 80))
    found.instances[0].refusal = "another model"
    assert "engine-0: another model" in "\n".join(drawn(found, 80))


def test_a_server_that_went_away_is_said_beside_what_was() -> None:
    text = "\n".join(drawn(report(), 100, "no server answers"))
    assert "waiting: no server answers" in text and "as it was" in text
    assert "waiting: no server answers" in "\n".join(drawn(None, 80, "no server answers"))


# --- against servers -----------------------------------------------------------------------------


@contextlib.contextmanager
def serving(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def answering(
    body: bytes, status: int = 200
) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def test_once_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(answering(ANSWER)) as url:
        assert main(["top", url, "--once"]) == 0
        text = capsys.readouterr().out
        assert "engine-4" in text and "\x1b" not in text
        assert main(["top", url + "/v1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(ANSWER)
        assert main(["top", url]) == 0  # no terminal here: once
        assert "engine-4" in capsys.readouterr().out


def test_the_key_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["authorization"])
        answering(ANSWER)(handler)

    with serving(answer) as url:
        monkeypatch.setenv("PENSTOCK_ADMIN_KEY", "from-env")
        assert (
            main(["top", url, "--once"]) == main(["top", url, "--once", "--admin-key=given"]) == 0
        )
    assert seen == ["Bearer from-env", "Bearer given"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 401, "wants its admin key"),
        (b"<html>", 200, "says something else"),
        (b"\xff\xfe\x00", 200, "says something else"),
        (b"{}", 200, "says something else"),
        (b'{"instances": 7}', 200, "says something else"),
        (b"[" * 100_000, 200, "says something else"),
        (b"not found", 404, "answered 404"),
        (b"", 302, "answered 302"),
    ],
)
def test_servers_that_say_something_else(
    body: bytes, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(answering(body, status)) as url:
        assert main(["top", url, "--once"]) == 1
    assert said in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", f"http://127.0.0.1:{free_port()}", "--once"]) == 1
    assert "no server answers" in capsys.readouterr().err
    assert main(["top", "nonsense"]) == 2
    assert main(["top", "--once", "--uds", "/nowhere.sock"]) == 1
    assert "unix:/nowhere.sock" in capsys.readouterr().err


# --- in a terminal -------------------------------------------------------------------------------


class Terminal:
    def __init__(self, *arguments: str) -> None:
        self._screen, child = pty.openpty()
        self.process = subprocess.Popen(
            penstock("top", *arguments),
            stdin=child, stdout=child, stderr=child,
            env=environment(TERM="xterm", COLUMNS="80", LINES="24"),
            start_new_session=True,
        )  # fmt: skip
        os.close(child)
        self.text = ""

    def wait_for(self, pattern: str, timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline_s, f"no {pattern!r} in {self.text[-2000:]!r}"
            self.text += os.read(self._screen, 65536).decode(errors="replace")

    def end(self) -> int:
        """Its exit code, once everything it wrote has been read."""
        with contextlib.suppress(OSError):  # EIO: nobody holds the other side any more
            while chunk := os.read(self._screen, 65536):
                self.text += chunk.decode(errors="replace")
        return self.process.wait(20)

    def press(self, key: str) -> None:
        os.write(self._screen, key.encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._screen)
        self.process.kill()
        self.process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_live_until_q_and_a_server_that_goes_and_comes() -> None:
    answers: list[bytes] = [ANSWER]

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        answering(answers[-1])(handler)

    with serving(answer) as url:
        terminal = Terminal(url, "--interval", "0.1")
        try:
            terminal.wait_for("engine-4")
            answers.append(b"garbage")
            terminal.wait_for("waiting: http")
            answers.append(msgspec.json.encode(report(6)))
            terminal.wait_for("engine-5")
            terminal.press("q")
            assert terminal.end() == 0, terminal.text[-3000:]
            assert "Traceback" not in terminal.text
        finally:
            terminal.close()
