"""`cme eval winrate`."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cme import command_line
from cme.command_line import OK
from cme.evaluation.winrate.options import OneResponse, Options
from cme.options import add_options, options_of

_DESCRIPTION = """\
Has a judge compare the responses of two models, or of three, and says how often A's are preferred, how sure that
is, and whether length or the order in which responses were shown explains it.

A, B and --base are models (hub id, folder, or a model of the demo), whose responses are generated and kept, or
files of responses: .jsonl, .csv, .parquet with `prompt` and `response` (and `id`), or AlpacaEval's outputs, .json.
To learn whether training helped, give the trained model as A and the checkpoint that it started from as B.
"""

_EPILOG = """\
exit codes:
  0    done
  1    an error, which is explained; or too many calls of the judge failed (what there is has been written)
  2    the command line makes no sense
  130  interrupted; the same command goes on where it stopped, and pays for no call twice

examples:
  cme eval winrate runs/mine/model Qwen/Qwen2.5-0.5B-Instruct --prompts prompts.jsonl -o runs/winrate \\
      --judge https://api.openai.com/v1 --judge-model gpt-4.1-mini --price-in 0.4 --price-out 1.6
  cme eval winrate after.jsonl before.jsonl -o runs/winrate --judge local:Qwen/Qwen3-8B
  cme eval winrate --annotations annotations.json
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.print_judge_prompt:
        from cme.evaluation.winrate.template import DEFAULT

        print(DEFAULT, end="")
        return OK
    _check(parser, arguments)

    def command() -> int:
        from cme.evaluation.winrate.report import table
        from cme.evaluation.winrate.run import TooManyFailures

        try:
            report = _run(arguments)
        except TooManyFailures as error:
            print(table(error.report))
            raise
        print(table(report))
        if arguments.output is not None:
            print(f"\nwritten to {arguments.output}")
        return OK

    return command_line.run(
        command,
        arguments.output,
        lambda: "the same command goes on where this one stopped",
        f"Lower --batch-size (it is {arguments.batch_size}) or free memory",
    )


def _run(arguments: argparse.Namespace) -> Any:
    from cme.evaluation.winrate.run import compare, recompute

    a = arguments
    if a.annotations is not None:
        return recompute(a.annotations, a.output)
    options = Options(
        contestants=tuple(name for name in (a.a, a.b, a.base) if name is not None),
        output=a.output,
        prompts=a.prompts,
        limit=a.limit,
        only_common=a.only_common,
        generation=options_of(OneResponse, a),
        model_options=_model_options(a),
        judge_prompt=a.judge_prompt,
        weighted=a.weighted,
        max_failures=a.max_failures,
        retry_unparsable=a.retry_unparsable,
        prices=None if a.price_in is None else (a.price_in, a.price_out),
        progress=a.progress,
    )
    return compare(options, _judge(a))


def _judge(arguments: argparse.Namespace) -> Any:
    a = arguments
    if a.judge.startswith("local:"):
        from cme.evaluation.winrate.local_judge import LocalJudge

        return LocalJudge(a.judge.removeprefix("local:"), _model_options(a))
    from cme.errors import CMEError

    try:
        from cme.evaluation.winrate.endpoint import DEFAULT_OPTIONS, EndpointJudge
    except ImportError as error:
        raise CMEError(f"{error}: pip install 'cme[judge]'") from error

    options = {**DEFAULT_OPTIONS, **dict(a.judge_options)}
    key_env = a.judge_key_env or "OPENAI_API_KEY"
    key = os.environ.get(key_env, "").strip() or None
    if key is None and a.judge_key_env is not None:
        raise CMEError(f"the environment variable {key_env} is not set: put the judge's key into it")
    url, login = _without_login(a.judge)
    return EndpointJudge(
        url=url.rstrip("/").removesuffix("/chat/completions"),
        model=a.judge_model,
        key=key,
        key_env=key_env,
        login=login,
        options={name: value for name, value in options.items() if value is not None},
        concurrency=a.concurrency,
        timeout=a.timeout,
        retries=a.retries,
    )


def _without_login(url: str) -> tuple[str, str | None]:
    """A URL, and the user:password that it had, which are for the server alone."""
    parts = re.fullmatch(r"(\w+://)?(?:([^/?#]*)@)?(.*)", url, re.DOTALL)
    assert parts is not None
    return (parts[1] or "") + parts[3], None if parts[2] is None else unquote(parts[2])


def _model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    a = arguments
    return {"dtype": a.dtype, "device": a.device, "trust_remote_code": a.trust_remote_code}


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    a = arguments
    if a.annotations is not None:
        if a.a is not None or a.judge is not None:
            parser.error("--annotations recomputes what has been judged: give no models and no judge with it")
        return
    if a.b is None:
        parser.error("give two models or files of responses, A and B, or --annotations")
    if a.output is None:
        parser.error("name a folder for the results: -o FOLDER")
    if a.judge is None:
        parser.error("name a judge: --judge URL --judge-model NAME, or --judge local:MODEL")
    if (a.price_in is None) != (a.price_out is None):
        parser.error("give both --price-in and --price-out")
    if a.judge.startswith("local:"):
        return
    if a.weighted:
        parser.error("--weighted needs the probabilities of a local judge")
    if not a.judge.startswith(("http://", "https://")):
        parser.error(f"--judge {_without_login(a.judge)[0]!r} is neither an http(s) URL nor local:MODEL")
    if a.judge_key_env is not None and _without_login(a.judge)[1] is not None:
        parser.error("--judge has a user and a password, --judge-key-env names a key: one of them can be sent")
    if a.judge_model is None:
        parser.error("name the judge's model with --judge-model")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cme eval winrate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", nargs="?", metavar="[NAME=]A", help="a model, or a file of responses")
    parser.add_argument("b", nargs="?", metavar="[NAME=]B", help="what A is compared with")
    parser.add_argument("--base", metavar="[NAME=]C", help="a third one; all pairs are compared")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="for the results; used again to go on")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="rows with `prompt` (a text or messages), or AlpacaEval's .json (default: those in A's file)",
    )
    parser.add_argument("--limit", type=command_line.positive, metavar="N", help="the first N prompts only")
    parser.add_argument(
        "--only-common", action="store_true", help="leave out prompts that not everybody answered (default: stop)"
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="recompute win rates from AlpacaEval's annotations (A is generator_2, B is generator_1)",
    )
    command_line.add_progress(parser)
    add_options(parser, OneResponse)
    command_line.add_models(parser.add_argument_group("the models"), "the weights, a local judge's too")
    _add_judge(parser.add_argument_group("the judge"))
    return parser


def _add_judge(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--judge",
        metavar="URL|local:MODEL",
        help="an OpenAI-compatible endpoint (http://host:port/v1, or with user:password@ before the host), or a "
        "model that is loaded here",
    )
    group.add_argument("--judge-model", metavar="NAME", help="what the endpoint calls it")
    group.add_argument(
        "--judge-key-env",
        metavar="NAME",
        help="environment variable that holds the key (default: OPENAI_API_KEY, if it is set)",
    )
    group.add_argument(
        "--judge-prompt", type=Path, metavar="FILE", help="a text with {prompt}, {first} and {second}"
    )
    group.add_argument(
        "--weighted",
        action="store_true",
        help="count a local judge's probabilities, not its verdicts: a preference of 0.6 is 0.6 of a win",
    )
    group.add_argument("--print-judge-prompt", action="store_true", help="print the default one, and stop")
    group.add_argument(
        "--judge-option",
        dest="judge_options",
        action="append",
        default=[],
        type=_option,
        metavar="KEY=VALUE",
        help="in every request; the value is JSON, null takes a default away (defaults: temperature=0, "
        "max_tokens=2048); may be repeated",
    )
    group.add_argument(
        "--concurrency", type=command_line.positive, default=8, metavar="N", help="calls at a time (default: 8)"
    )
    group.add_argument(
        "--timeout",
        type=command_line.above_zero,
        default=120,
        metavar="S",
        help="seconds for a whole answer (default: 120)",
    )
    group.add_argument(
        "--retries",
        type=command_line.whole,
        default=5,
        metavar="N",
        help="after HTTP 429 or 5xx, a timeout, no connection (default: 5)",
    )
    group.add_argument(
        "--max-failures",
        type=command_line.share,
        default=0.01,
        metavar="SHARE",
        help="of calls that may fail; with more, the results are marked and the exit code is 1 (default: 0.01)",
    )
    group.add_argument(
        "--retry-unparsable",
        action="store_true",
        help="ask again where an earlier run found no verdict in the answer",
    )
    group.add_argument(
        "--price-in", type=command_line.not_negative, metavar="USD", help="for a million prompt tokens"
    )
    group.add_argument(
        "--price-out", type=command_line.not_negative, metavar="USD", help="for a million completion tokens"
    )


def _option(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
