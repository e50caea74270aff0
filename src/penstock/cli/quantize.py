"""`penstock quantize MODEL OUT`: a checkpoint in fewer bits, for this engine and for others."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.checkpoint import Checkpoint, resolve
from penstock.cli import process
from penstock.cli.flags import add_log_level
from penstock.cli.parser import Parser, count
from penstock.protocol.errors import ConfigError

if TYPE_CHECKING:
    from penstock.engine.quantization.convert import Report

_DESCRIPTION = """Write MODEL to the folder OUT with its linears in 8 or 4 bits, in the format of
compressed-tensors, which transformers reads too. No data is needed. int8: a scale for each output
channel, activations quantized as they come. int4: groups of 128 with zero points. The output head
stays as it is in the file, and is loaded as int8 here."""
MIB = 1 << 20


def _parser() -> Parser:
    parser = Parser("quantize", _DESCRIPTION)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint folder, a GGUF file, a hub id, or toy")
    add("out", metavar="OUT", help="a folder that is not there yet")
    add("--scheme", required=True, metavar="SCHEME", help="int8 or int4")
    add("--group-size", type=count, metavar="WEIGHTS", help="of int4: 128, 64 or 32 (128)")
    add("--max-shard-size", type=count, metavar="BYTES", help="largest file of weights (5G)")
    add("--revision", help="branch, tag or commit on the hub")
    add("--num-threads", type=count, metavar="N", help="threads of the CPU's kernels")
    add(
        "--no-eval",
        action="store_true",
        help="leave out the perplexity before and after, for models that carry a text for it",
    )
    add_log_level(parser)
    return parser


def run(arguments: list[str]) -> int:
    options = vars(_parser().parse(arguments))
    out = Path(options["out"]).expanduser()
    if options["scheme"] not in ("int8", "int4"):
        raise ConfigError(f"there is no scheme {options['scheme']!r}: int8 and int4 are there")
    with process.interruptible():
        return _quantize(options, out)


def _quantize(options: dict[str, Any], out: Path) -> int:
    import torch  # takes a while

    from penstock.engine.quantization.convert import quantize_checkpoint
    from penstock.engine.quantization.schemes import scheme_named

    if "num_threads" in options:
        torch.set_num_threads(options["num_threads"])
    scheme = scheme_named(options["scheme"], options.get("group_size"))
    checkpoint = resolve(options["model"], revision=options.get("revision"))
    with _Bar() as bar:
        report = quantize_checkpoint(
            checkpoint,
            out,
            scheme,
            max_shard_bytes=options.get("max_shard_size", 5_000_000_000),
            progress=bar.show,
        )
    _print(report, out)
    if "no_eval" not in options:
        _print_perplexity(checkpoint, out, options.get("num_threads"))
    return 0


def _print(report: Report, out: Path) -> None:
    before, after = report.bytes_before, report.bytes_after
    print(f"weights: {before / MIB:.1f} MiB before, {after / MIB:.1f} after ({after / before:.0%})")
    by_kind: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, error in report.errors.items():
        by_kind[name.rpartition(".")[2]].append((error, name))
    print("relative error |W - Q| / |W| of the linears:")
    for kind, found in by_kind.items():
        mean = sum(error for error, _ in found) / len(found)
        worst, where = max(found)
        print(f"  {kind:<12} mean {mean:.4f}, most {worst:.4f} ({where})")
    print(f"written to {out}")


def _print_perplexity(checkpoint: Checkpoint, out: Path, num_threads: int | None) -> None:
    from penstock.perplexity import TEXT_FILE, eval_texts, perplexity_of

    texts = eval_texts(checkpoint)
    if not texts:
        return
    before, num_tokens = perplexity_of(str(checkpoint.path), texts, num_threads=num_threads)
    after, _ = perplexity_of(str(out), texts, num_threads=num_threads)
    print(
        f"perplexity over {num_tokens:,} tokens of {TEXT_FILE}: {before:.2f} before, "
        f"{after:.2f} after ({after / before - 1:+.2%})"
    )


class _Bar:
    """The fraction that is done, where somebody looks. It begins with the first fraction: what is
    refused before that has an error alone."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        shown = sys.stderr.isatty()
        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not shown)
        self._task = self._bar.add_task("quantizing", total=1.0)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def show(self, fraction: float) -> None:
        self._bar.start()  # once; no more than that if it has
        self._bar.update(self._task, completed=fraction)
