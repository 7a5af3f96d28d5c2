"""The command line of `cme eval correctness`."""

from __future__ import annotations

from collections.abc import Sequence

from cme import command_line
from cme.command_line import FAILED, INCOMPLETE, INTERRUPTED, OK
from cme.evaluation.correctness.options import Options
from cme.files.tables import FORMATS
from cme.options import Parser, parse
from cme.tasks.registry import TASKS

_DESCRIPTION = """\
Does the likelihood of a response under a verifier say whether it is right, and more than its controls do: length,
the generator's own likelihood, a verifier with random weights, a majority vote?"""

_WIDTH = max(map(len, TASKS))
_EPILOG = f"""\
DATA is a file ({", ".join(FORMATS)}) or a task. A file's rows have a prompt, a response or
a list of responses, and `correct` (true or false, or a list), or else gold answers in `answer` with --matcher:
  exact     the response is the answer, up to case, accents and punctuation
  contains  the answer's words occur in the response
  numeric   the response's last number (or that after "answer is", "####", in \\boxed{{}}) equals the answer
  math      the LaTeX in \\boxed{{}} equals the answer (pip install 'cme[eval]')
  choice    the option named, by letter or text; the column `choices` holds the options
Rows with equal prompts ask one question. Without responses, --generator answers the questions.

tasks (pip install 'cme[eval]' for all but capitals):
{chr(10).join(f"  {name:<{_WIDTH}}  {task.about}" for name, task in TASKS.items())}
  {"NAME":<{_WIDTH}}  any other data set of reasoning-gym, such as gcd or letter_counting

files in the output folder: correctness.json (all numbers), correctness.md, correctness.png, responses.jsonl (each
response with its signals), journal/ (with which an interrupted run resumes).

exit codes:
  {OK}    done
  {FAILED}    an error, which is explained; what was finished is kept
  2    the command line makes no sense
  {INCOMPLETE}    written, but the labels are all right or all wrong, or lines of the file were malformed
  {INTERRUPTED}  interrupted; the same command resumes where it stopped

examples:
  cme eval correctness capitals --generator smollm2-135m-instruct --verifier gemma-3-270m -o runs/capitals
  cme eval correctness samples_gsm8k.jsonl --verifier Qwen/Qwen3-0.6B -o runs/gsm8k
  cme eval correctness answers.jsonl --matcher numeric --verifier Qwen/Qwen3-0.6B -o runs/mine
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(prog="cme eval correctness", description=_DESCRIPTION, epilog=_EPILOG)
    options = parse(parser, Options, argv)

    def command() -> int:
        from transformers.utils import logging

        from cme.evaluation.correctness.report import plain
        from cme.evaluation.correctness.run import run

        logging.disable_progress_bar()
        result = run(options)
        print(f"{plain(result)}\nwritten to {options.output}")
        undecided = next(iter(result["signals"].values()))["auroc"] is None
        return INCOMPLETE if undecided or result["malformed"] else OK

    return command_line.run(
        command,
        options.output,
        lambda: "the same command (without --overwrite) resumes where this one stopped",
        f"Lower --batch-size (it is {options.generation.batch_size}) if it was sampling, else --max-batch-tokens "
        f"(it is {options.max_batch_tokens})",
    )
