"""One run of `cme score`."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cme.engine.memory import token_budget
from cme.errors import CMEError, DatasetError
from cme.files.atomic import beside, followed, locked
from cme.files.partial import Chunk, Partial, partial_of
from cme.files.records import Example, Layout, examples_of, find_layout
from cme.files.tables import OUTPUT_FORMATS, Malformed, Table, format_of, open_table
from cme.fingerprint import fingerprint
from cme.score_file.columns import Columns, Scores, not_scored
from cme.score_file.options import Options
from cme.score_file.progress import Progress
from cme.score_file.summary import Summary
from cme.score_file.write import Added, Output, malformed_of, write_malformed
from cme.scores import SIGNAL_STATS, ResponseScore
from cme.text.rendering import text_of, unescaped
from cme.verifier import Verifier

MAX_CHUNK_CHARACTERS = 2**18
"""Text in a chunk, however many rows: a chunk is what an interruption loses."""

Parsed = list[Example] | Malformed
"""A row: the responses in it."""

_BUDGETS = "tokens_per_pass"  # in the partial file's first line


def say(text: str) -> None:
    """Tell the user what is going on; standard output is the summary's."""
    print(text, file=sys.stderr, flush=True)


def score_file(options: Options) -> Summary:
    """Score a file, or resume an interrupted run with the same options.

    Raises CMEError, which says what to do.
    """
    _check_names(options)
    _check_paths(options)
    with locked(options.output, beside(options.output, "lock")):
        partial = Partial(partial_of(options.output))
        if options.overwrite:
            partial.delete()
        _check_free(options.output, options, partial)
        table = open_table(options.input)
        if table.survey.malformed:
            _check_free(malformed_of(options.output), options, partial)
        layout = find_layout(table, options.columns)
        _check_end_of_turn(table, layout, options)
        columns = Columns.of(options, layout)
        columns.check(table.survey.columns, options)
        output = Output(table, options.output, columns)
        identity = {"input": {"sha256": table.sha256}, "options": options.identity()}
        partial.check(identity)
        say(
            f"{options.input}: {table.survey.rows:,} rows; loading {', '.join(v.model for v in options.verifiers)}"
        )
        verifiers = {name: v.at(partial.began) for name, v in _load(options).items()}
        identity["verifiers"] = {name: fingerprint(verifier) for name, verifier in verifiers.items()}
        partial.check(identity)
        for name, found in identity["verifiers"].items():
            say(f"{name}: {found['dtype']} on {found['device']}, {_template(verifiers[name])}")
        began_with = (partial.header() or {}).get(_BUDGETS)
        budgets = _budgets(verifiers, options, began_with)
        verifiers = {name: replace(v, max_batch_tokens=budgets[name]) for name, v in verifiers.items()}
        done = partial.start({**identity, _BUDGETS: budgets})
        if done:
            say(f"{done:,} of {table.survey.rows:,} rows were scored before; resuming")
            _warn_of_other_passes(began_with, budgets)
        with Progress(table.survey.rows, done, options.progress) as progress:
            for chunk in _chunks(table, layout, done, options.chunk_rows):
                scored = _score(chunk, verifiers, columns, options, progress)
                table.check_unchanged()  # else scores would stand beside other rows than theirs
                partial.append(scored)
        table.check_unchanged()
        summary = Summary(columns, session=progress.rate())
        replaces = options.output.exists()
        output.write(summary.observe(row for chunk in partial.chunks() for row in chunk.rows))
        _list_malformed(malformed_of(options.output), partial, summary, replaces)
        partial.delete()
        _warn_of_nonsense(summary, verifiers)
        return summary


def _check_end_of_turn(table: Table, layout: Layout, options: Options) -> None:
    if options.score_end_of_turn and not layout.has_finished:
        raise DatasetError(
            "--score-end-of-turn needs to know which responses ended by themselves: name the column that says so "
            f"with --finished-column (it has {', '.join(table.survey.columns)}), or say --all-finished"
        )


def _list_malformed(path: Path, partial: Partial, summary: Summary, replaces: bool) -> None:
    lines = (row for chunk in partial.chunks() for row in chunk.rows if isinstance(row, Malformed))
    if summary.num_malformed:
        write_malformed(path, lines)
    elif replaces:
        path.unlink(missing_ok=True)  # the list of the output that this one has replaced


def _score(
    chunk: Sequence[Parsed],
    verifiers: Mapping[str, Verifier],
    columns: Columns,
    options: Options,
    progress: Progress,
) -> Chunk:
    examples = [example for row in chunk if not isinstance(row, Malformed) for example in row]
    sound = [example for example in examples if example.problem is None]
    progress.begin_chunk(len(chunk), len(sound) * len(verifiers))
    scores: dict[str, list[ResponseScore]] = {
        name: verifier.score(
            [example.prompt for example in sound],
            [example.response for example in sound],
            stats=SIGNAL_STATS,
            finished=[example.finished for example in sound],
            score_end_of_turn=options.score_end_of_turn,
            token_spans=options.tokens or options.columns.span_column is not None,
            on_scored=progress.scored,
        )
        for name, verifier in verifiers.items()
    }
    of_sound: Iterator[Scores] = (
        dict(zip(scores, each, strict=True)) for each in zip(*scores.values(), strict=True)
    )

    def added(row: Parsed) -> Added:
        if isinstance(row, Malformed):
            return row
        each = [next(of_sound) if e.problem is None else _for_all(verifiers, not_scored(e.problem)) for e in row]
        return columns.of_row(row, each)

    finished = Chunk([added(row) for row in chunk])
    progress.end_chunk(
        len(chunk), sum(s.num_tokens for each in scores.values() for s in each if s.tokens is not None)
    )
    return finished


def _for_all(verifiers: Mapping[str, Verifier], score: ResponseScore) -> Scores:
    return dict.fromkeys(verifiers, score)


def _chunks(table: Table, layout: Layout, skip: int, max_rows: int) -> Iterator[list[Parsed]]:
    """The rows after the first `skip`, cut at places that depend on the rows alone, so that a continued run makes
    the same forward passes as one that was not interrupted."""
    chunk: list[Parsed] = []
    characters, prompts = 0, set[str]()  # a prompt is encoded once for all of its responses in a chunk
    for row in itertools.islice(table.rows(), skip, None):
        parsed = row if isinstance(row, Malformed) else examples_of(row, layout)
        chunk.append(parsed)
        for example in [] if isinstance(parsed, Malformed) else parsed:
            prompt = text_of(example.prompt)
            characters += len(text_of(example.response)) + (0 if prompt in prompts else len(prompt))
            prompts.add(prompt)
        if len(chunk) == max_rows or characters >= MAX_CHUNK_CHARACTERS:
            yield chunk
            characters, prompts, chunk = 0, set(), []
    if chunk:
        yield chunk


def _load(options: Options) -> dict[str, Verifier]:
    verifiers, models = {}, options.models
    for verifier in options.verifiers:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            verifiers[verifier.name] = Verifier.from_pretrained(
                verifier.model,
                **models.kwargs(),
                device_map=models.device_map,
                template=unescaped(models.template),
                chat_template_kwargs=models.variables,
            )
        for message in caught:
            if message.category is UserWarning:
                say(f"warning: {message.message}")
    return verifiers


def _template(verifier: Verifier) -> str:
    template = verifier.renderer.template
    return "its chat template" if template is None else f"the template {template!r}"


def _budgets(
    verifiers: Mapping[str, Verifier], options: Options, began_with: Mapping[str, int] | None
) -> dict[str, int]:
    """Tokens in a pass of each verifier. A continued run makes the same ones, whatever memory is free now."""
    if options.models.max_batch_tokens is not None:
        return dict.fromkeys(verifiers, options.models.max_batch_tokens)
    return dict(began_with or {name: token_budget(verifier.model) for name, verifier in verifiers.items()})


def _warn_of_other_passes(began_with: Mapping[str, int] | None, budgets: Mapping[str, int]) -> None:
    # It may have to be lowered for the run to be resumed at all
    for name, before in (began_with or {}).items():
        if before != budgets[name]:
            say(
                f"warning: {name} began with {before} tokens per pass and resumes with {budgets[name]}: the last "
                "digits of the remaining scores may differ from those of an uninterrupted run"
            )


def _warn_of_nonsense(summary: Summary, verifiers: Mapping[str, Verifier]) -> None:
    # Nothing but its scores gives away a tokenizer of another model with as many tokens
    for name, verifier in verifiers.items():
        mean = summary.means.get(summary.columns.name(name, "mean_logprob"))
        chance = -math.log(verifier.model.config.get_text_config().vocab_size)
        if mean is not None and mean < chance:
            say(
                f"warning: {name} finds the responses less likely than random tokens (mean_logprob {mean:.2f}, "
                f"chance {chance:.2f}): is its tokenizer that of the model, and does the template suit it?"
            )


def _check_names(options: Options) -> None:
    names = [verifier.name for verifier in options.verifiers]
    for name in names:
        if names.count(name) > 1:
            raise CMEError(
                f"two verifiers are called {name!r}: give them names, --verifier a=MODEL --verifier b=MODEL"
            )


def _check_paths(options: Options) -> None:
    format_of(options.output, OUTPUT_FORMATS)
    folder = followed(options.output).parent
    if not folder.is_dir():
        raise CMEError(f"there is no folder {str(folder)!r} for the output: make it first")
    if options.output.is_dir():
        raise CMEError(f"the output {str(options.output)!r} is a folder: name a file")
    if options.output.exists() and not options.output.is_file():
        raise CMEError(f"the output {str(options.output)!r} is a device or a pipe: name a file")
    for path in (options.output, malformed_of(options.output)):
        if path.exists() and options.input.exists() and path.samefile(options.input):
            raise CMEError("the output would replace the input: name another file")


def _check_free(path: Path, options: Options, partial: Partial) -> None:
    if path.exists() and not options.overwrite and partial.header() is None:
        raise CMEError(f"{path} exists: name another file, or replace it with --overwrite")
