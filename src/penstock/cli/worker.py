"""`penstock worker`: one engine instance as a process."""

from __future__ import annotations

from pathlib import Path

from penstock.checkpoint import resolve
from penstock.cli import logs
from penstock.cli.flags import add_engine_flags, add_log_level, add_model, engine_config, model_of
from penstock.cli.parser import Parser, count
from penstock.engine.config import WorkerConfig
from penstock.protocol.errors import PenstockError

_DESCRIPTION = """Run one engine instance. `penstock serve` starts its own; start more by hand to
put several instances behind one service (serve --engine-address)."""


def worker_config(arguments: list[str]) -> WorkerConfig:
    parser = Parser("worker", _DESCRIPTION)
    add_model(parser)
    parser.add_argument(
        "--address", required=True, help="where to listen: ipc:///path or tcp://127.0.0.1:port"
    )
    parser.add_argument("--name", help="what services call it (engine-0)")
    parser.add_argument("--incarnation", type=count, help="grows with each start of a name (1)")
    parser.add_argument("--parent-pid", type=count, help="end when this process is gone")
    add_log_level(parser)
    add_engine_flags(parser)
    options = parser.parse(arguments)
    own = ("address", "name", "incarnation", "parent_pid", "log_level")
    return WorkerConfig(
        engine=engine_config(model_of(parser, options), options),
        **{name: getattr(options, name) for name in own if hasattr(options, name)},
    )


def _head_dim(model: str) -> int | None:
    """What config.json says at a glance; what is wrong with it is said when the model is loaded."""
    if model != "toy" and not Path(model).exists():
        return None
    try:
        config = resolve(model).config
    except PenstockError:
        return None
    found = config.get("head_dim")
    if found is None:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
            return None
        found = hidden // heads
    return found if isinstance(found, int) and found > 0 and found % 16 == 0 else None


def run(arguments: list[str]) -> int:
    config = worker_config(arguments)
    logs.set_up(config.log_level, name=config.name)
    if config.engine.device != "cuda":
        from penstock.engine.platforms.cpu.kernels import build_ahead

        build_ahead(_head_dim(config.engine.model))
    from penstock.engine.instance import run_worker  # brings torch, which takes a while

    return run_worker(config)
