"""`penstock doctor MODEL`: what will happen, and what is wrong, before anything is started."""

from __future__ import annotations

import json

from penstock.cli.checks import Finding, examine
from penstock.cli.parser import Parser
from penstock.cli.serve import config_of, make_parser

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}
_TITLES = {"checkpoint": "Checkpoint", "machine": "Machine", "plan": "What will happen"}


def _parser() -> Parser:
    parser = make_parser(
        "doctor", "Check MODEL and this machine. Takes the flags of `serve` and judges by them."
    )
    parser.add_argument("--json", action="store_true", help="findings and facts for programs")
    return parser


def run(arguments: list[str]) -> int:
    """0 if MODEL can be served here with these flags, else 1."""
    serve, engine = config_of(_parser(), arguments)
    findings, facts = examine(engine, serve)
    can_serve = all(finding.level != "error" for finding in findings)
    if "--json" in arguments:
        print(_as_json(findings, facts, can_serve))
    else:
        _show(findings, can_serve, serve.model)
    return 0 if can_serve else 1


def _as_json(findings: list[Finding], facts: dict[str, object], can_serve: bool) -> str:
    listed = [{"area": f.area, "level": f.level, "text": f.text} for f in findings]
    return json.dumps({"can_serve": can_serve, "findings": listed, **facts}, indent=2, default=str)


def _show(findings: list[Finding], can_serve: bool, model: str) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for area, title in _TITLES.items():
        console.print(f"\n{title}", style="bold")
        for finding in findings:
            if finding.area == area:
                mark, colour = _MARKS[finding.level]
                console.print(f"  {mark} ", style=colour, end="")
                console.print(finding.text, markup=False)
    console.print()
    num_errors = sum(finding.level == "error" for finding in findings)
    if can_serve:
        console.print(f"{model} can be served here.", style="green", markup=False)
    else:
        console.print(
            f"{model} cannot be served here: {num_errors} problem{'s' * (num_errors > 1)} above.",
            style="red",
            markup=False,
        )
