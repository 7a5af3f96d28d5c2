"""The command line's options, which a help text shows at once: nothing heavy is imported."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cme.evaluation.options import Generation
from cme.options import ModelOptions, number, option, positive

_JUDGE = "the judge"


@dataclass(frozen=True)
class OneResponse(Generation):
    """To each prompt, as comparisons have it."""

    samples: int = 1


def key_and_value(text: str) -> tuple[str, Any]:
    """The type of an option KEY=VALUE, whose value is JSON or, where it is none, a text."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@dataclass(frozen=True)
class Options:
    """Options of `cme eval winrate`."""

    a: str | None = option(None, "a model, or a file of responses", positional=True, metavar="[NAME=]A")
    b: str | None = option(None, "what A is compared with", positional=True, metavar="[NAME=]B")
    base: str | None = option(None, "a third one; all pairs are compared", metavar="[NAME=]C")
    output: Path | None = option(
        None, "folder for the results, in which the same command resumes", short="-o", metavar="FOLDER"
    )
    prompts: Path | None = option(
        None,
        "rows with `prompt` (a text or messages), or AlpacaEval's .json (default: those of the responses)",
        metavar="FILE",
    )
    limit: int | None = option(None, "the first N prompts only", type=positive, metavar="N")
    only_common: bool = option(False, "leave out prompts that not everybody answered (default: stop)")
    annotations: Path | None = option(
        None,
        "recompute win rates from AlpacaEval's annotations (A is generator_2, B is generator_1)",
        metavar="FILE",
    )
    progress: bool = option(True, "show no bar")
    generation: OneResponse = OneResponse()
    models: ModelOptions = ModelOptions()
    judge: str | None = option(
        None,
        "an OpenAI-compatible endpoint (http://host:port/v1, or with user:password@ before the host), or a model "
        "that is loaded here",
        group=_JUDGE,
        metavar="URL|local:MODEL",
    )
    judge_model: str | None = option(None, "the endpoint's name of the model", group=_JUDGE, metavar="NAME")
    judge_key_env: str | None = option(
        None,
        "environment variable that holds the key (default: OPENAI_API_KEY, if it is set)",
        group=_JUDGE,
        metavar="NAME",
    )
    judge_prompt: Path | None = option(
        None, "a text with {prompt}, {first} and {second}", group=_JUDGE, metavar="FILE"
    )
    print_judge_prompt: bool = option(False, "print the default one, and stop", group=_JUDGE)
    judge_option: tuple[tuple[str, Any], ...] = option(
        (),
        "in every request; the value is JSON, null takes a default away (defaults: temperature=0, "
        "max_tokens=2048); may be repeated",
        group=_JUDGE,
        type=key_and_value,
        metavar="KEY=VALUE",
    )
    concurrency: int = option(8, "calls at a time", group=_JUDGE, type=positive, metavar="N")
    timeout: float = option(
        120.0, "seconds for a whole answer", group=_JUDGE, type=number(float, above=0), metavar="S"
    )
    retries: int = option(
        5,
        "after HTTP 408, 409, 429 or 5xx, a timeout, no connection",
        group=_JUDGE,
        type=number(int, at_least=0),
        metavar="N",
    )
    max_failures: float = option(
        0.01,
        "of calls that may fail; with more, the results are marked and the exit code is 1",
        group=_JUDGE,
        type=number(float, at_least=0, at_most=1),
        metavar="SHARE",
    )
    retry_unparsable: bool = option(
        False, "ask again where an earlier run found no verdict in the answer", group=_JUDGE
    )

    @property
    def contestants(self) -> tuple[str, ...]:
        """Models or files of responses, `NAME=` first to call them so."""
        return tuple(name for name in (self.a, self.b, self.base) if name is not None)

    @property
    def local_judge(self) -> bool:
        return self.judge is not None and self.judge.startswith("local:")

    @property
    def endpoint(self) -> tuple[str, str | None]:
        """The URL of `judge`, and the user:password that it has, which are for the server alone."""
        parts = re.fullmatch(r"(\w+://)?(?:([^/?#]*)@)?(.*)", self.judge or "", re.DOTALL)
        assert parts is not None
        return (parts[1] or "") + parts[3], None if parts[2] is None else unquote(parts[2])

    def problem(self) -> str | None:
        """The reason why these options make no sense together; None if they do."""
        if self.annotations is not None:
            alone = self.a is None and self.judge is None
            return None if alone else "--annotations has been judged already: give no models and no judge with it"
        if self.b is None:
            return "give two models or files of responses, A and B, or --annotations"
        if self.output is None:
            return "name a folder for the results: -o FOLDER"
        if self.judge is None:
            return "name a judge: --judge URL --judge-model NAME, or --judge local:MODEL"
        url, login = self.endpoint
        if not self.judge.startswith(("http://", "https://", "local:")):
            return f"--judge {url!r} is neither an http(s) URL nor local:MODEL"
        if self.judge_key_env is not None and login is not None:
            return "--judge has a user and a password, --judge-key-env names a key: one of them can be sent"
        if self.judge_model is None and not self.local_judge:
            return "name the judge's model with --judge-model"
        return None

    def settings(self) -> dict[str, Any]:
        """For the record, as JSON."""
        return {
            "contestants": list(self.contestants),
            "prompts": None if self.prompts is None else str(self.prompts),
            "limit": self.limit,
            "only_common": self.only_common,
            "generation": self.generation.settings(),
            "max_failures": self.max_failures,
        }
