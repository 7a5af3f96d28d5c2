"""`cme eval`: each evaluation is a module with a parser of its own."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {
    "correctness": (
        "cme.evaluation.correctness.cli",
        "does a verifier's likelihood tell right answers from wrong",
    ),
    "winrate": ("cme.evaluation.winrate.cli", "whose responses does a judge prefer, of two models"),
    "text": (
        "cme.evaluation.text.cli",
        "length, repetition, copying, drift: what training did to the text",
    ),
}
"""Module, which has `main(argv) -> exit code`, and what it answers."""


def main(argv: Sequence[str]) -> int:
    """Run an evaluation; the exit codes are those of `cme`."""
    parser = argparse.ArgumentParser(
        prog="cme eval", description="Evaluation that can say no. `cme eval COMMAND --help` shows the options."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, (_, help_text) in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    known, _ = parser.parse_known_args(argv[:1])
    module = importlib.import_module(COMMANDS[known.command][0])
    code: int = module.main(list(argv[1:]))
    return code
