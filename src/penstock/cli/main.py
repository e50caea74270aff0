"""`penstock`: finds the command, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from penstock import PROJECT, __version__
from penstock.protocol.errors import ConfigError, PenstockError

#: Command -> (module with `run(arguments) -> exit code`, what it does). Modules are imported when
#: their command runs, so that `penstock --help` imports next to nothing.
COMMANDS = {
    "serve": ("penstock.cli.serve", "serve MODEL over HTTP, OpenAI's API"),
    "chat": ("penstock.cli.chat", "talk to a model in the terminal"),
    "doctor": ("penstock.cli.doctor", "check a checkpoint and this machine, say what will happen"),
    "quantize": ("penstock.cli.quantize", "write a checkpoint in fewer bits"),
    "bench": ("penstock.cli.bench", "put a small load on a running server and measure it"),
    "replay": ("penstock.cli.replay", "replay a recorded run of a service, or with a change"),
    "trace": ("penstock.cli.trace", "say what a trace of requests is like; make one up"),
    "top": ("penstock.cli.top", "watch the instances of a running service"),
    "costs": ("penstock.cli.costs", "write what the steps of a running instance cost"),
    "up": ("penstock.cli.up", "run a cluster on the nodes of a Ray cluster"),
    "simulate": ("penstock.cli.simulate", "run a trace through simulated clusters, compared"),
    "plan": ("penstock.cli.plan", "find the cheapest cluster that serves a trace within its SLOs"),
    "advise": ("penstock.cli.advise", "say whether prefill and decode should be apart, and how"),
    "router": ("penstock.cli.router", "the service alone, over engines that run elsewhere"),
    "worker": ("penstock.cli.worker", "run one engine instance (started by `serve`)"),
    "version": ("penstock.cli.version", "print versions"),
}

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where what goes wrong can be said
        return code
    except PenstockError as exc:
        if "debug" in arguments:  # --log-level debug
            traceback.print_exc()
        print(f"{PROJECT}: {exc.message}", file=sys.stderr)
        return EXIT_USAGE if isinstance(exc, ConfigError) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # whoever read it has enough
        return EXIT_FAILURE
    except (MemoryError, OSError, ImportError, RuntimeError) as exc:
        if isinstance(exc, OSError) and exc.errno in _NO_ROOM:
            _drop_output()
            print(f"{PROJECT}: cannot write: {exc.strerror}", file=sys.stderr)
            return EXIT_FAILURE
        if not _is_out_of_memory(exc):
            raise
        print(f"{PROJECT}: there is not enough memory, or none allowed: {exc}", file=sys.stderr)
        return EXIT_FAILURE


def _drop_output() -> None:
    """Nothing can be written there any more, and Python must not try to at exit."""
    sys.stdout = None  # type: ignore[assignment]  # the stubs do not say that it may be None


#: A full disk, a quota, a device that fails: nothing that a traceback would explain.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
#: Only torch, the loader of libraries and the threads say it in words.
_NO_MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "can't start new thread",
    "failed to map segment",
)


def _is_out_of_memory(exc: BaseException) -> bool:
    if isinstance(exc, MemoryError) or getattr(exc, "errno", None) == errno.ENOMEM:
        return True
    return any(word in str(exc).lower() for word in _NO_MEMORY_WORDS)


def _run(arguments: list[str]) -> int:
    match arguments:
        case [] | ["help"] | ["-h", *_] | ["--help", *_]:
            print(_help())
            return 0
        case ["help", command, *_]:
            arguments = [command, "--help"]
        case ["--version" | "-V", *_]:
            print(f"{PROJECT} {__version__}")
            return 0
    command, *rest = arguments
    if command not in COMMANDS:
        from penstock.cli.parser import nearest

        raise ConfigError(
            f"there is no command {command!r}{nearest(command, COMMANDS)}: see {PROJECT} --help"
        )
    code = import_module(COMMANDS[command][0]).run(rest)
    assert isinstance(code, int)
    return code


def _help() -> str:
    lines = [f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROJECT} COMMAND ...",
            "",
            *lines,
            "",
            f"{PROJECT} COMMAND --help says more. To begin: {PROJECT} serve toy",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
