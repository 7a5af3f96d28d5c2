"""The command `cme`. Nothing heavy is imported before it is known that it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cme import command_line
from cme.command_line import FAILED, INCOMPLETE, INTERRUPTED, OK
from cme.files.tables import STANDARD
from cme.options import Parser, parse
from cme.score_file.options import Options

_EPILOG = f"""\
added columns:
  mean_logprob, sum_logprob, perplexity, mean_entropy, bits_per_byte, top1_rate, num_tokens, and
  unscorable, which says why there is no score; docs/scoring.md defines them

exit codes:
  {OK}    every line was read; responses without a score say why in the column `unscorable`
  {FAILED}    an error, which is explained; what was finished is kept
  2    the command line makes no sense
  {INCOMPLETE}    the output is written, but lines of the input were malformed, or no response could be scored
  {INTERRUPTED}  interrupted; the same command resumes where it stopped

examples:
  cme score answers.jsonl -o scores.parquet --verifier Qwen/Qwen3-0.6B
  cme score chats.parquet -o scores.jsonl --messages-column conversation --tokens --verifier ./my-model
  zstd -dc answers.jsonl.zst | cme score - -o - --verifier Qwen/Qwen3-0.6B | gzip > scores.jsonl.gz
  cme score answers.csv -o scores.csv --verifier small=Qwen/Qwen3-0.6B --verifier large=Qwen/Qwen3-4B
"""


@command_line.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["train"]:  # has a parser of its own, which takes every option of TRL
        from cme.train.__main__ import main as train

        return train(arguments[1:])
    _quiet()
    if arguments[:1] == ["eval"]:
        from cme.evaluation.cli import main as evaluate

        return evaluate(arguments[1:])
    if arguments[:1] == ["score"]:
        return _score(parse(_score_parser(), Options, arguments[1:]))
    _parser().parse_args(arguments)  # shows the commands, or says that there is no such one
    return OK


def _score(options: Options) -> int:
    def command() -> int:  # with the imports, which take seconds in which one may press Ctrl-C
        from transformers.utils import logging

        from cme.score_file.run import score_file
        from cme.score_file.write import malformed_of

        logging.disable_progress_bar()
        summary = score_file(options)
        if options.output == STANDARD:
            print(summary, file=sys.stderr)
        else:
            print(f"{summary}\nwritten to {options.output}")
            if summary.num_malformed:
                print(f"all malformed lines are listed in {malformed_of(options.output)}")
        return INCOMPLETE if summary.num_malformed or not summary.scored else OK

    at_once = options.models.max_batch_tokens
    return command_line.run(
        command,
        Path("standard output") if options.output == STANDARD else options.output.parent,
        lambda: _how_to_resume(options),
        "If the model alone is too large, --dtype bfloat16 halves it and --device-map auto spreads it. "
        f"Lower --max-batch-tokens{f' (it is {at_once})' if at_once else ''} or free memory",
    )


def _how_to_resume(options: Options) -> str:
    from cme.files.partial import partial_of

    if options.output == STANDARD:
        return "the scores so far are on standard output"
    if not partial_of(options.output).exists():
        return "nothing had been scored"
    return "the same command (without --overwrite) resumes where this one stopped"


def _score_parser() -> Parser:
    return Parser(
        prog="cme score",
        usage="%(prog)s INPUT -o OUTPUT --verifier [NAME=]MODEL [options]",
        description="Add to each row of a file how likely its response is under a verifier.",
        epilog=_EPILOG,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="cme", description="Cross-Model Entropy: score text under a frozen verifier, and train on the score."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{score,train,eval}")
    commands.add_parser("score", help="score the responses in a file; `cme score --help` shows its options")
    commands.add_parser("train", help="train a model on the score; `cme train --help` shows its options")
    commands.add_parser("eval", help="evaluate a verifier or a trained model; `cme eval --help` shows how")
    return parser


def _quiet() -> None:
    # Bars and notes of libraries that a user of this command can't act on
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
