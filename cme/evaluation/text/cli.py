"""The command line of `cme eval text`."""

from __future__ import annotations

from collections.abc import Sequence

from cme import command_line
from cme.evaluation.text.options import Options
from cme.files.tables import FORMATS
from cme.options import Parser, parse

_DESCRIPTION = """\
Compare the responses of two models, or in two files, without labels: length, finished and truncated, empty,
repeated, copied from the prompt, distinct n-grams, bytes, entropy, KL divergence."""

_EPILOG = f"""\
A is the start model, with which B is compared. Files ({", ".join(FORMATS)}) are read as by every
command: columns prompt and response, and finished if it is known. Entropy, and with two models of one tokenizer
the KL divergence of B from A, are over the tokens of the text, without the end of the turn.

The folder gets text.json, text.md, text.png and the responses of each side. After an interruption the same command
continues with the responses that are there.

examples:
  cme eval text smollm2-135m-instruct runs/demo/model --prompts capitals --samples 4 --max-new-tokens 20 -o report
  cme eval text before.jsonl after.jsonl -o report
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; the exit codes are those of `cme`."""
    options = parse(Parser(prog="cme eval text", description=_DESCRIPTION, epilog=_EPILOG), Options, argv)

    def command() -> int:
        from transformers.utils import logging

        from cme.evaluation.text.run import run

        logging.disable_progress_bar()
        print(run(options))
        print(f"written to {options.output}")
        return command_line.OK

    return command_line.run(
        command,
        options.output,
        lambda: "the same command (without --overwrite) resumes with the responses that are there",
        f"Lower --batch-size (it is {options.generation.batch_size}) or free memory",
    )
