"""The command line of `cme eval winrate`."""

from __future__ import annotations

from collections.abc import Sequence

from cme import command_line
from cme.command_line import OK
from cme.errors import CMEError
from cme.evaluation.winrate.judges import Judge, LocalJudge
from cme.evaluation.winrate.options import Options
from cme.files.tables import FORMATS
from cme.options import Parser, parse

_DESCRIPTION = f"""\
Has a judge compare the responses of two models, or of three, and says how often A's are preferred, how sure that
is, and whether length or the order in which responses were shown explains it.

A, B and --base are models (hub id, folder, or a model of the demo), whose responses are generated and kept, or
files of responses ({", ".join(FORMATS)}): rows with `prompt` and `response`,
or with `id` and `response` where another file has the prompts, or AlpacaEval's outputs.
To learn whether training helped, give the trained model as A and the checkpoint that it started from as B.
"""

_EPILOG = """\
exit codes:
  0    done
  1    an error, which is explained; or too many calls of the judge failed (what there is has been written)
  2    the command line makes no sense
  130  interrupted; the same command resumes, and pays for no call twice

examples:
  cme eval winrate runs/mine/model Qwen/Qwen2.5-0.5B-Instruct --prompts prompts.jsonl -o runs/winrate \\
      --judge https://api.openai.com/v1 --judge-model gpt-4.1-mini
  cme eval winrate after.jsonl before.jsonl -o runs/winrate --judge local:Qwen/Qwen3-8B
  cme eval winrate --annotations annotations.json
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(prog="cme eval winrate", description=_DESCRIPTION, epilog=_EPILOG)
    options = parse(parser, Options, argv)
    if options.print_judge_prompt:
        from cme.evaluation.winrate.verdict import DEFAULT

        print(DEFAULT, end="")
        return OK
    if (problem := options.problem()) is not None:
        parser.error(problem)
    return command_line.run(
        lambda: _run(options),
        options.output,
        lambda: "the same command resumes where this one stopped",
        f"Lower --batch-size (it is {options.generation.batch_size}) or free memory",
    )


def _run(options: Options) -> int:
    from cme.evaluation.winrate.report import plain
    from cme.evaluation.winrate.run import TooManyFailures, compare, recompute

    try:
        if options.annotations is not None:
            report = recompute(options.annotations, options.output)
        else:
            report = compare(options, _judge(options))
    except TooManyFailures as error:
        print(plain(error.report))
        raise
    print(plain(report))
    if options.output is not None:
        print(f"\nwritten to {options.output}")
    return OK


def _judge(options: Options) -> Judge:
    if options.local_judge:
        return LocalJudge(str(options.judge).removeprefix("local:"), options.models)
    try:
        from cme.evaluation.winrate.endpoint import EndpointJudge
    except ImportError as error:
        raise CMEError(f"{error}: pip install 'cme[judge]'") from error
    return EndpointJudge(options)
