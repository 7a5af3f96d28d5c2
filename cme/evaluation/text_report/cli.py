"""The command line of `cme eval text`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cme import command_line
from cme.command_line import OK
from cme.evaluation.options import Generation
from cme.evaluation.text_report.options import GENERATION, Options
from cme.options import ModelOptions, add_options, options_of

_EPILOG = """\
A is what B is compared with: the start model. Files are .jsonl, .json, .csv or .parquet with columns prompt and
response (or a list of responses), and finished if it is known. With two models of one tokenizer the divergence of
B from A is estimated, too. It and the entropy are over the tokens of the text, without the end of the turn.

The folder gets text.json, text.md, text.png and the responses of each side. Interrupted, the same command goes on
with the responses that are there.

examples:
  cme eval text smollm2-135m-instruct runs/demo/model --prompts capitals --samples 4 --max-new-tokens 20 -o report
  cme eval text before.jsonl after.jsonl -o report
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; the exit codes are those of `cme`."""
    arguments = _parser().parse_args(argv)

    def command() -> int:
        from transformers.utils import logging

        from cme.evaluation.text_report.run import run

        logging.disable_progress_bar()
        print(run(_options(arguments)))
        print(f"written to {arguments.output}")
        return OK

    return command_line.run(
        command,
        arguments.output,
        lambda: "the same command (without --overwrite) goes on with the responses that are there",
        f"Lower --batch-size (it is {arguments.batch_size}) or free memory",
    )


def _options(arguments: argparse.Namespace) -> Options:
    a = arguments
    return Options(
        a=a.a,
        b=a.b,
        output=a.output,
        prompts=a.prompts,
        limit=a.limit,
        generation=options_of(Generation, a),
        models=options_of(ModelOptions, a),
        overwrite=a.overwrite,
        progress=a.progress,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cme eval text",
        description="Compare the responses of two models, or in two files, without labels: length, finished and "
        "truncated, empty, repeated, copied from the prompt, distinct n-grams, bytes, entropy, KL.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="a model (hub id, local folder, demo model) or a file of responses")
    parser.add_argument("b", metavar="B", help="the same, to compare with A")
    parser.add_argument(
        "--prompts", metavar="FILE_OR_TASK", help="a task (held-out questions), a file, or a hub id"
    )
    parser.add_argument("--limit", type=command_line.positive, metavar="N", help="the first N prompts only")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/text"), help="folder (default: runs/text)")
    parser.add_argument("--overwrite", action="store_true", help="generate again what the folder has")
    command_line.add_progress(parser)
    add_options(parser, Generation, GENERATION)
    add_options(parser, ModelOptions)
    return parser
