"""The command line of `cme eval correctness`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cme import command_line
from cme.command_line import FAILED, INCOMPLETE, INTERRUPTED, OK
from cme.evaluation.correctness.options import GENERATION, Options, Samples
from cme.options import ModelOptions, add_options, options_of
from cme.tasks.questions import SPLITS
from cme.tasks.registry import MATCHERS, TASKS

DESCRIPTION = """\
Does the likelihood of a response under a verifier say whether it is right, and more than its controls do: length,
the generator's own likelihood, a verifier with random weights, a majority vote?"""

_WIDTH = max(map(len, TASKS))
EPILOG = f"""\
DATA is a file (.jsonl, .csv, .parquet) or a task. A file's rows have a `prompt` (or `question`), a `response` or a
list of `responses`, and `correct` (true or false, or a list), or else gold answers in `answer` with --matcher:
  exact     the response is the answer, up to case, accents and punctuation
  contains  the answer's words occur in the response
  numeric   the response's last number (or that after "answer is", "####", in \\boxed{{}}) equals the answer
  math      the LaTeX in \\boxed{{}} equals the answer (pip install 'cme[eval]')
  choice    the option named, by letter or text; the column `choices` holds the options
Rows with equal prompts ask one question. Without responses, --generator answers the questions.

tasks (pip install 'cme[eval]' for all but capitals, mmlu, triviaqa, gsm8k and truthfulqa):
{chr(10).join(f"  {name:<{_WIDTH}}  {task.about}" for name, task in TASKS.items())}
  {"NAME":<{_WIDTH}}  any other data set of reasoning-gym, such as gcd or letter_counting

files in the output folder: correctness.json (all numbers), correctness.md, correctness.png, responses.jsonl (each
response with its signals), journal/ (what an interrupted run goes on from).

exit codes:
  {OK}    done
  {FAILED}    an error, which is explained; what was finished is kept
  2    the command line makes no sense
  {INCOMPLETE}    written, but the labels are all right or all wrong, or lines of the file were malformed
  {INTERRUPTED}  interrupted; the same command goes on where it stopped

examples:
  cme eval correctness capitals --generator smollm2-135m-instruct --verifier gemma-3-270m -o runs/capitals
  cme eval correctness mmlu --verifier Qwen/Qwen3-0.6B --limit 500 -o runs/mmlu
  cme eval correctness answers.jsonl --matcher numeric --verifier Qwen/Qwen3-0.6B -o runs/mine
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)

    def command() -> int:
        from transformers.utils import logging

        from cme.evaluation.correctness.report import plain
        from cme.evaluation.correctness.run import run

        logging.disable_progress_bar()
        result = run(_options(arguments))
        print(f"{plain(result)}\nwritten to {arguments.output}")
        undecided = next(iter(result["signals"].values()))["auroc"] is None
        return INCOMPLETE if undecided or result["malformed"] else OK

    return command_line.run(
        command,
        arguments.output,
        lambda: "the same command (without --overwrite) goes on where this one stopped",
        f"Lower --batch-size (it is {arguments.batch_size}) if it was sampling, else --max-batch-tokens (it is "
        f"{arguments.max_batch_tokens})",
    )


def _options(arguments: argparse.Namespace) -> Options:
    from cme.options import parse_chat_template_kwargs

    values = {name: value for name, value in vars(arguments).items() if name in Options.__dataclass_fields__}
    values["verifier_chat_template_kwargs"] = parse_chat_template_kwargs(
        arguments.verifier_chat_template_kwargs, "--verifier-chat-template-kwargs"
    )
    return Options(**values, generation=options_of(Samples, arguments), models=options_of(ModelOptions, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cme eval correctness",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="a file, or a task's name (below)")
    add("--verifier", required=True, metavar="MODEL", help="hub id, local folder or demo model")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    _add_responses(parser.add_argument_group("the responses"))
    add_options(parser, Samples, GENERATION)
    add_options(parser, ModelOptions)
    _add_columns(parser.add_argument_group("where a file has what (default: columns with the usual names)"))
    _add_models(parser.add_argument_group("the models"))
    _add_run(parser.add_argument_group("the run"))
    return parser


def _add_responses(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--generator", metavar="MODEL", help="samples the responses; its own likelihood is a control"
    )
    group.add_argument(
        "--candidates", action="store_true", help="take a task's options, not samples, as responses"
    )
    group.add_argument(
        "--split", choices=(*SPLITS, "all"), default="held_out", help="of a task (default: held_out)"
    )
    group.add_argument(
        "--limit", type=command_line.positive, metavar="N", help="the first N questions only (default: all)"
    )


def _add_columns(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--matcher", metavar="NAME", help=f"of gold answers: {', '.join(MATCHERS)} (below)")
    for name, text in (
        ("prompt", "a text, or messages (default: prompt, question)"),
        ("response", "one or a list (default: response, responses, completion, completions)"),
        ("correct", "true or false, or a list (default: correct)"),
        ("answer", "gold answer, or a list of accepted ones (default: answer, answers)"),
        ("choices", "the options (default: choices)"),
        ("span", "the answer in the response, a text or [start, end), to score alone too"),
        ("id", "unique ids (default: id)"),
    ):
        group.add_argument(f"--{name}-column", metavar="NAME", help=text)


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--template",
        default="auto",
        metavar="TEXT",
        help="of the verifier: chat, or a text with {prompt} and {response} (default: chat if it has a template)",
    )
    group.add_argument(
        "--random-verifiers",
        type=int,
        default=1,
        metavar="N",
        help="controls: the verifier's architecture with random weights (default: 1)",
    )
    group.add_argument(
        "--verifier-chat-template-kwargs",
        metavar="JSON",
        help="variables of the verifier's chat template; those of the generator's: --chat-template-kwargs",
    )
    command_line.add_max_batch_tokens(group, Options.max_batch_tokens)


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap (default: 10000)"
    )
    group.add_argument("--overwrite", action="store_true", help="forget an earlier run in the folder")
    command_line.add_progress(group)
