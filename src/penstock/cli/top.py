"""`penstock top`: the instances of a running service, live in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec

from penstock import PROJECT
from penstock.cli import client
from penstock.cli.parser import Parser, seconds
from penstock.protocol.errors import (
    AuthenticationFailed,
    EngineUnavailable,
    InvalidRequest,
    PenstockError,
)
from penstock.service.report import ClusterReport

KEY_VARIABLE = "PENSTOCK_ADMIN_KEY"
_TIMEOUT = httpx.Timeout(3.0)
_DRAW_EVERY_S = 0.25
#: Seconds of tokens a second that the line beside them shows.
_HISTORY = 120
_MAX_ANSWER_BYTES = 64 << 20


def make_parser() -> Parser:
    parser = Parser(
        "top",
        "Show the instances of a running service: roles, states, queues, KV, and times.",
        "q quits. Without a terminal, as with --once, it prints once.",
    )
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", help="of the service (http://127.0.0.1:8000)")
    add("--url", dest="url_flag", help=argparse.SUPPRESS)  # as chat has it
    add("--uds", metavar="PATH", help="its Unix socket instead")
    add("--admin-key", metavar="KEY", help=f"the service's key for /admin; else ${KEY_VARIABLE}")
    add("--interval", type=seconds, metavar="SECONDS", help="between two looks (1)")
    add("--once", action="store_true", help="print once and end")
    add("--json", action="store_true", help="the same as JSON, as /admin/cluster answers")
    return parser


def run(arguments: list[str]) -> int:
    options = make_parser().parse(arguments)
    key = getattr(options, "admin_key", None) or os.environ.get(KEY_VARIABLE)
    said = getattr(options, "url", None) or getattr(options, "url_flag", None)
    url = said or "http://127.0.0.1:8000"
    uds = getattr(options, "uds", None)
    with client.connect(url, key) if uds is None else client.connect_uds(Path(uds)) as http:
        http.timeout = _TIMEOUT
        http.headers.update(client.headers(key))
        source = Source(http, f"unix:{uds}" if uds is not None else str(http.base_url))
        if hasattr(options, "json"):
            print(source.fetch_json().decode())
        elif hasattr(options, "once") or not (sys.stdin.isatty() and sys.stdout.isatty()):
            _print_once(source)
        else:
            _live(source, getattr(options, "interval", 1.0))
    return 0


class Source:
    """Where reports come from."""

    def __init__(self, http: client.Http, name: str) -> None:
        self.name = name.rstrip("/")
        self._http = http

    def fetch(self) -> ClusterReport:
        """Raises `PenstockError`s that say what to do."""
        return self._decode(self.fetch_json())

    def fetch_json(self) -> bytes:
        """The same as it came, once it is known to be a report."""
        try:
            response = self._http.get("/admin/cluster")
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise EngineUnavailable(f"no server answers at {self.name} ({exc})") from exc
        if response.status_code == 401:
            raise AuthenticationFailed(
                f"{self.name} wants its admin key: give --admin-key or ${KEY_VARIABLE}"
            )
        if response.status_code != 200 or len(response.content) > _MAX_ANSWER_BYTES:
            raise self._foreign(f"answered {response.status_code}")
        self._decode(response.content)
        return response.content

    def _decode(self, body: bytes) -> ClusterReport:
        try:
            return msgspec.json.decode(body, type=ClusterReport)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise self._foreign(f"says something else: {exc}") from exc

    def _foreign(self, what: str) -> InvalidRequest:
        return InvalidRequest(
            f"{self.name}/admin/cluster {what}; is this a {PROJECT} server of this version?"
        )


def _print_once(source: Source) -> None:
    from rich.console import Console

    from penstock.cli.top_view import view

    report = source.fetch()
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # nobody wraps a pipe
    console.print(view(report, source.name, "", [], console.width))


# --- live ----------------------------------------------------------------------------------------


class Poller(threading.Thread):
    """Looks again and again, so that a server that does not answer holds up no key."""

    def __init__(self, source: Source, interval_s: float) -> None:
        super().__init__(daemon=True)
        self.report: ClusterReport | None = None
        self.trouble = f"{source.name} has not answered yet"
        self.history: deque[float] = deque(maxlen=_HISTORY)
        self._source = source
        self._interval_s = max(0.1, interval_s)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self.look()
            self._ended.wait(self._interval_s)

    def look(self) -> None:
        try:
            self.report = self._source.fetch()
            self.history.append(self.report.totals.tokens_per_s)
            self.trouble = ""
        except PenstockError as exc:
            self.trouble = exc.message

    def stop(self) -> None:
        self._ended.set()
        self.join(5.0)


def _live(source: Source, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from penstock.cli.top_view import view

    console = Console(highlight=False)
    poller = Poller(source, interval_s)
    poller.look()
    poller.start()
    try:
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(
                    view(poller.report, source.name, poller.trouble, poller.history, console.width),
                    refresh=True,
                )
                if pressed.wait(_DRAW_EVERY_S) in ("q", "Q", "\x03", "\x04"):
                    return
    finally:
        poller.stop()


class Keys:
    def wait(self, timeout_s: float) -> str:
        """The key pressed within the time, or "". A terminal that is gone counts as q."""
        ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
        return (os.read(sys.stdin.fileno(), 1).decode("latin-1") or "q") if ready else ""


@contextlib.contextmanager
def _keys() -> Iterator[Keys]:
    """Keys as they are pressed, unechoed; the terminal is as before afterwards."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield Keys()
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
