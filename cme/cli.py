"""The command `cme`. Nothing heavy is imported before it is known that it is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cme import command_line
from cme.command_line import FAILED, INCOMPLETE, INTERRUPTED, OK
from cme.files.tables import FORMATS, OUTPUT_FORMATS
from cme.score_file.options import CHUNK_ROWS, Options, name_verifiers

_EPILOG = f"""\
added columns:
  mean_logprob, sum_logprob, perplexity, mean_entropy, bits_per_byte, top1_rate, num_tokens, and
  unscorable, which says why there is no score; docs/scoring.md defines them

exit codes:
  {OK}    every line was read; responses without a score say why in the column `unscorable`
  {FAILED}    an error, which is explained; what was finished is kept
  2    the command line makes no sense
  {INCOMPLETE}    the output is written, but lines of the input were malformed, or no response could be scored
  {INTERRUPTED}  interrupted; the same command goes on where it stopped

examples:
  cme score answers.jsonl -o scores.parquet --verifier Qwen/Qwen3-0.6B
  cme score chats.parquet -o scores.jsonl --messages-column conversation --tokens --verifier ./my-model
  cme score answers.csv -o scores.csv --verifier small=Qwen/Qwen3-0.6B --verifier large=Qwen/Qwen3-4B
"""


@command_line.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["train"]:  # has a parser of its own, which takes every option of TRL
        from cme.train.run import main as train

        return train(arguments[1:])
    if arguments[:1] == ["eval"]:
        _quiet()
        from cme.evaluation.cli import main as evaluate

        return evaluate(arguments[1:])
    return _score(_parser().parse_args(arguments))


def _score(arguments: argparse.Namespace) -> int:
    _quiet()
    output: Path = arguments.output

    def command() -> int:  # with the imports, which take seconds in which one may press Ctrl-C
        from transformers.utils import logging

        from cme.score_file.run import score_file
        from cme.score_file.write import malformed_of

        logging.disable_progress_bar()
        summary = score_file(_options(arguments))
        print(f"{summary}\nwritten to {output}")
        if summary.num_malformed:
            print(f"all malformed lines are listed in {malformed_of(output)}")
        return INCOMPLETE if summary.num_malformed or not summary.scored else OK

    return command_line.run(
        command,
        output.parent,
        lambda: _how_to_continue(output),
        "If the model alone is too large, --dtype bfloat16 halves it and --device-map auto spreads it. "
        "Lower --max-batch-tokens"
        + (f" (it is {arguments.max_batch_tokens})" if arguments.max_batch_tokens else "")
        + " or free memory",
    )


def _options(arguments: argparse.Namespace) -> Options:
    from cme.options import parse_chat_template_kwargs

    values = {name: value for name, value in vars(arguments).items() if name != "command"}
    values["verifiers"] = name_verifiers(arguments.verifiers)
    values["chat_template_kwargs"] = parse_chat_template_kwargs(
        arguments.chat_template_kwargs, "--chat-template-kwargs"
    )
    return Options(**values)


def _how_to_continue(output: Path) -> str:
    from cme.files.partial import partial_of

    if not partial_of(output).exists():
        return "nothing had been scored"
    return "the same command (without --overwrite) goes on where this one stopped"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cme", description="Cross-Model Entropy: score text under a frozen verifier, and train on the score."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{score,train,eval}")
    score = commands.add_parser(
        "score",
        usage="cme score INPUT -o OUTPUT --verifier [NAME=]MODEL [options]",
        help="score the responses in a file",
        description="Add to each row of a file how likely its response is under a verifier.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("input", metavar="INPUT", type=Path, help=", ".join(FORMATS))
    score.add_argument("-o", "--output", type=Path, required=True, help=", ".join(OUTPUT_FORMATS))
    score.add_argument(
        "--verifier",
        dest="verifiers",
        action="append",
        required=True,
        metavar="[NAME=]MODEL",
        help="hub id or local folder; may be repeated, columns are then called NAME/mean_logprob and so on",
    )
    commands.add_parser("train", help="train a model on the score; `cme train --help` shows its options")
    commands.add_parser("eval", help="evaluate a verifier or a trained model; `cme eval --help` shows how")
    _add_columns(score.add_argument_group("where the input has what (default: columns with the usual names)"))
    _add_scores(score.add_argument_group("what is scored"))
    _add_models(score.add_argument_group("the verifiers"))
    _add_run(score.add_argument_group("the run"))
    return parser


def _add_columns(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt-column", metavar="NAME", help="a text, or messages (default: prompt)")
    group.add_argument(
        "--response-column",
        metavar="NAME",
        help="a text, a message, or a list of either (default: response, responses, completion, completions)",
    )
    group.add_argument(
        "--messages-column",
        metavar="NAME",
        help="conversations whose last message is the response (default: messages, if there is no prompt)",
    )
    group.add_argument(
        "--finished-column",
        metavar="NAME",
        help="whether a response ended by itself: true/false, or stop/length (default: finished, finish_reason)",
    )
    group.add_argument("--all-finished", action="store_true", help="every response ended by itself")
    group.add_argument(
        "--span-column",
        metavar="NAME",
        help="a part of the response to score alone too: a text in it (its last occurrence), or [start, end)",
    )


def _add_scores(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tokens", action="store_true", help="add a column with every token and its signals")
    group.add_argument(
        "--score-end-of-turn",
        action="store_true",
        help="score the token that ends the turn, too, where the response ended by itself",
    )
    group.add_argument("--prefix", default="", metavar="TEXT", help="before the names of the added columns")


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--template",
        default="auto",
        metavar="TEXT",
        help="chat, or a text with {prompt} and {response} (default: the model's chat template if it has one)",
    )
    command_line.add_chat_template_kwargs(group)
    command_line.add_models(group, device_map=True)
    command_line.add_max_batch_tokens(group, None)


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--overwrite", action="store_true", help="replace an output, forget an unfinished run")
    group.add_argument(
        "--chunk-rows",
        type=command_line.positive,
        default=CHUNK_ROWS,
        metavar="N",
        help="most rows to score, and to lose in an interruption, at once (default: %(default)s)",
    )
    command_line.add_progress(group)


def _quiet() -> None:
    # Bars and notes of libraries that a user of this command can't act on
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
