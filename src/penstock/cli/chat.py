"""`penstock chat`: a conversation in the terminal, with a running server or a private one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from subprocess import Popen
from typing import Any

from penstock import PROJECT
from penstock.cli import client, process
from penstock.cli.flags import (
    add_engine_flags,
    add_log_level,
    add_model,
    engine_arguments,
    engine_config,
    model_of,
)
from penstock.cli.parser import Parser, count
from penstock.cli.serve import KEY_VARIABLES
from penstock.protocol.errors import ConfigError, PenstockError, StartupError

_HELP = """/reset forgets the conversation, /system TEXT sets the instructions (and forgets),
/exit or Ctrl-D leaves, Ctrl-C stops an answer."""


def make_parser() -> Parser:
    parser = Parser("chat", "Talk to MODEL (toy by default), or to the server at --url.", _HELP)
    add_model(parser)
    add = parser.add_argument_group("chat").add_argument
    add("--url", help="a running server, such as http://127.0.0.1:8000; else a private one starts")
    add("--api-key", metavar="KEY", help=f"for --url; else ${KEY_VARIABLES[0]}")
    add("--system", metavar="TEXT", help="instructions that stand before the conversation")
    add("--temperature", type=float)
    add("--max-tokens", type=count, metavar="N", help="of one answer")
    add_log_level(parser)
    add_engine_flags(parser)
    return parser


def run(arguments: list[str]) -> int:
    parser = make_parser()
    options = parser.parse(arguments)
    url = getattr(options, "url", None)
    if url is not None:
        key = getattr(options, "api_key", None) or os.environ.get(KEY_VARIABLES[0])
        with client.connect(url, key) as http:
            return _converse(http, options)
    model = model_of(parser, options, default="toy")
    engine = engine_arguments(engine_config(model, options))
    level = getattr(options, "log_level", "error")
    with tempfile.TemporaryDirectory(prefix=f"{PROJECT}-chat-") as folder:
        socket = Path(folder) / "http.sock"
        flags = [f"--uds={socket}", f"--log-level={level}", "--no-banner", "--stop-with-parent"]
        with (
            process.child(["serve", *engine, *flags]) as server,
            client.connect_uds(socket) as http,
        ):
            _wait_until_ready(http, server)
            return _converse(http, options)


def _wait_until_ready(http: client.Http, server: Popen[bytes]) -> None:
    while not client.is_ready(http):
        if server.poll() is not None:
            raise StartupError("the server for this chat did not start: its reason is above")
        client.pause()


def _converse(http: client.Http, options: argparse.Namespace) -> int:
    """Until the input ends. Errors of single requests are printed, and the talk goes on."""
    talk = Conversation(http, client.first_model(http), options)
    terminal = Terminal(interactive=sys.stdin.isatty())
    terminal.say(f"{talk.model}: type, or /help. Ctrl-D leaves.")
    while (line := terminal.ask()) is not None:
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit":
                break
            case "/help":
                terminal.say(_HELP)
            case "/reset":
                talk.reset()
                terminal.say("The conversation is forgotten.")
            case "/system":
                talk.reset(system=rest.strip())
                terminal.say("The instructions are set, the conversation is forgotten.")
            case _ if command.startswith("/"):
                terminal.say(f"There is no command {command}: see /help.")
            case _:
                terminal.show(talk, line)
    terminal.end()
    return 0


class Conversation:
    """The messages so far, and the sampling parameters that each request carries."""

    def __init__(self, http: client.Http, model: str, options: argparse.Namespace) -> None:
        self.model = model
        self._http = http
        self._parameters = {
            name: getattr(options, name)
            for name in ("temperature", "max_tokens", "seed")
            if hasattr(options, name)
        }
        self._system = getattr(options, "system", "")
        self.reset(self._system)

    def reset(self, system: str | None = None) -> None:
        self._system = self._system if system is None else system
        self.messages: list[dict[str, str]] = []
        if self._system:
            self.messages.append({"role": "system", "content": self._system})

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the reply as they come.

        What has come of it stays in the conversation, also when the iteration is broken off. A
        request that fails (`PenstockError`) leaves the conversation as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": asked, "stream": True, **self._parameters}
        pieces: list[str] = []
        try:
            for event in client.stream(self._http, "/v1/chat/completions", body):
                piece = _text_of(event)
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def _text_of(event: dict[str, Any]) -> str:
    if not event.get("choices"):
        return ""
    delta = event["choices"][0]["delta"]
    parts = [delta.get("reasoning_content") or "", delta.get("content") or ""]
    calls = delta.get("tool_calls")
    return "".join(parts) + (json.dumps(calls) if calls else "")


class Terminal:
    """What the user sees. Without a terminal there are answers only, for scripts and pipes."""

    def __init__(self, *, interactive: bool) -> None:
        from rich.console import Console

        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  arrow keys and history in input()
        self._interactive = interactive
        self._console = Console(highlight=False, soft_wrap=True)

    def ask(self) -> str | None:
        """A line, or None at the end of the input."""
        while True:
            try:
                return input("> " if self._interactive else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                self.say("\nCtrl-D leaves.")
            except UnicodeDecodeError:
                raise ConfigError("the input is not UTF-8") from None

    def show(self, talk: Conversation, text: str) -> None:
        pieces = talk.answer(text)
        try:
            for piece in pieces:
                self._console.print(piece, end="", markup=False)
        except KeyboardInterrupt:
            pieces.close()
            self.say(" [stopped]")
            return
        except PenstockError as exc:
            self._console.print(exc.message, style="red", markup=False)
            return
        self._console.print()

    def say(self, text: str) -> None:
        if self._interactive:
            self._console.print(text, style="dim", markup=False)

    def end(self) -> None:
        if self._interactive:
            self._console.print()
