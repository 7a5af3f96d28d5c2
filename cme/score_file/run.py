"""One run of `cme score`."""

from __future__ import annotations

import io
import itertools
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cme.engine.memory import token_budget
from cme.errors import CMEError, DatasetError
from cme.files.atomic import beside, followed, locked
from cme.files.partial import Partial, partial_of
from cme.files.records import Example, Record, Records
from cme.files.tables import OUTPUT_FORMATS, STANDARD, Malformed, Table, format_of, open_table
from cme.fingerprint import fingerprint
from cme.options import unescaped
from cme.score_file.columns import AddedColumns, Scores, not_scored
from cme.score_file.options import Options
from cme.score_file.summary import Progress, Summary
from cme.score_file.write import Added, Output, malformed_of, write_malformed
from cme.scores import SIGNAL_STATS, ResponseScore
from cme.text.messages import text_of
from cme.verifier import Verifier

MAX_CHUNK_CHARACTERS = 2**18
"""Text in a chunk, however many rows: a chunk is what an interruption loses."""

_BUDGETS = "tokens_per_pass"  # in the partial file's first line


def say(text: str) -> None:
    """Tell the user about the run, on standard error."""
    print(text, file=sys.stderr, flush=True)


def score_file(options: Options) -> Summary:
    """Score a file, or resume an interrupted run with the same options.

    Raises CMEError, which says what to do.
    """
    _check_names(options)
    if options.output == STANDARD:
        return _score_to_standard_output(options)
    _check_paths(options)
    with locked(options.output, beside(options.output, "lock")):
        partial = Partial(partial_of(options.output))
        if options.overwrite:
            partial.delete()
        _check_free(options.output, options, partial)
        job = _Job.of(options)
        if job.table.survey.malformed:
            _check_free(malformed_of(options.output), options, partial)
        output = Output(job.table, options.output, job.columns)
        identity = {"input": {"sha256": job.table.sha256}, "options": options.identity()}
        partial.check(identity)
        verifiers = {name: verifier.at(partial.began) for name, verifier in job.load().items()}
        identity["verifiers"] = {name: fingerprint(verifier) for name, verifier in verifiers.items()}
        partial.check(identity)
        for name, found in identity["verifiers"].items():
            say(f"{name}: {found['dtype']} on {found['device']}, {_template(verifiers[name])}")
        began_with = (partial.header() or {}).get(_BUDGETS)
        verifiers = _with_budgets(verifiers, options.models.max_batch_tokens, began_with)
        done = partial.start({**identity, _BUDGETS: {n: v.max_batch_tokens for n, v in verifiers.items()}})
        if done:
            say(f"{done:,} of {job.table.survey.rows:,} rows were scored before; resuming")
            _warn_of_other_passes(began_with, verifiers)
        with Progress(job.table.survey.rows, done, options.progress) as progress:
            for added in job.score(verifiers, done, progress):
                partial.append([[row.line, row.reason] if isinstance(row, Malformed) else row for row in added])
        summary = Summary(job.columns, session=progress.rate())
        replaces = options.output.exists()
        output.write(summary.observe(_kept(partial)))
        _list_malformed(malformed_of(options.output), partial, summary, replaces)
        partial.delete()
        _warn_of_nonsense(summary, verifiers)
        return summary


def _score_to_standard_output(options: Options) -> Summary:
    """Rows are written chunk by chunk, and nothing is kept for a later run."""
    job = _Job.of(options)
    verifiers = _with_budgets(job.load(), options.models.max_batch_tokens, None)
    summary = Summary(job.columns)
    file = io.TextIOWrapper(sys.stdout.buffer, "utf-8", newline="")

    def added() -> Iterator[Added]:
        for rows in job.score(verifiers, 0, progress):
            yield from rows
            file.flush()

    try:
        with Progress(job.table.survey.rows, 0, options.progress) as progress:
            Output(job.table, STANDARD, job.columns).write_to(file, summary.observe(added()))
        file.flush()
    except BrokenPipeError as error:
        raise CMEError("whoever reads standard output has left") from error
    finally:
        file.detach()
    summary.session = progress.rate()
    _warn_of_nonsense(summary, verifiers)
    return summary


@dataclass(frozen=True)
class _Job:
    """The input of a run, and the columns that it gets."""

    options: Options
    records: Records
    columns: AddedColumns

    @staticmethod
    def of(options: Options) -> _Job:
        """Raises DatasetError if the input can't be read, lacks a column, or has one that would be added."""
        table = open_table(options.input)
        records = Records(table, options.columns)
        layout = records.layout
        if options.score_end_of_turn and not layout.has_finished:
            raise DatasetError(
                "--score-end-of-turn needs to know which responses ended by themselves: name the column that says "
                f"so with --finished-column (it has {', '.join(table.survey.columns)}), or say --all-finished"
            )
        columns = AddedColumns(
            verifiers=tuple(verifier.name for verifier in options.verifiers),
            prefix=options.prefix,
            finished=layout.has_finished and layout.finished != options.prefix + "finished",
            span=layout.span is not None,
            tokens=options.tokens,
            many=layout.many,
        )
        both = [name for name in columns.kinds if name in table.survey.columns]
        if both:
            raise DatasetError(
                f"{table.name} already has the columns {', '.join(both)}: "
                "give the added ones other names with --prefix"
            )
        return _Job(options, records, columns)

    @property
    def table(self) -> Table:
        return self.records.table

    def load(self) -> dict[str, Verifier]:
        """The verifiers by name. Raises CMEError."""
        names, how = self.options.verifiers, self.options.models
        say(f"{self.table.name}: {self.table.survey.rows:,} rows; loading {', '.join(v.model for v in names)}")
        verifiers = {}
        for verifier in names:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                verifiers[verifier.name] = Verifier.from_pretrained(
                    verifier.model,
                    **how.kwargs(),
                    device_map=how.device_map,
                    template=unescaped(how.template),
                    chat_template_kwargs=how.chat_template_kwargs,
                )
            for message in caught:
                if message.category is UserWarning:
                    say(f"warning: {message.message}")
        return verifiers

    def score(self, verifiers: Mapping[str, Verifier], skip: int, progress: Progress) -> Iterator[list[Added]]:
        """The added values of the rows after the first `skip`. Raises DatasetError if the input has changed."""
        self.table.check_unchanged()
        for rows in self._chunks(skip):
            sound = [example for row in rows for example in _examples(row) if example.problem is None]
            progress.begin_chunk(len(rows), len(sound) * len(verifiers))
            scores = {name: self._ask(verifier, sound, progress) for name, verifier in verifiers.items()}
            each = (dict(zip(scores, of_one, strict=True)) for of_one in zip(*scores.values(), strict=True))
            added = [self._added(row, each) for row in rows]
            tokens = (score.num_tokens for found in scores.values() for score in found if score.tokens is not None)
            progress.end_chunk(len(rows), sum(tokens))
            self.table.check_unchanged()  # else scores would stand beside other rows than theirs
            yield added

    def _ask(self, verifier: Verifier, examples: Sequence[Example], progress: Progress) -> list[ResponseScore]:
        return verifier.score(
            [example.prompt for example in examples],
            [example.response for example in examples],
            stats=SIGNAL_STATS,
            finished=[example.finished for example in examples],
            score_end_of_turn=self.options.score_end_of_turn,
            token_spans=self.columns.tokens or self.columns.span,
            on_scored=progress.scored,
        )

    def _added(self, row: Record | Malformed, of_sound: Iterator[Scores]) -> Added:
        def scores(problem: str | None) -> Scores:
            return (
                next(of_sound) if problem is None else dict.fromkeys(self.columns.verifiers, not_scored(problem))
            )

        if isinstance(row, Malformed):
            return row
        return self.columns.of_row(row.examples, [scores(example.problem) for example in row.examples])

    def _chunks(self, skip: int) -> Iterator[list[Record | Malformed]]:
        """Cut at places that depend on the rows alone, so that a resumed run makes the same forward passes as one
        that was not interrupted."""
        chunk: list[Record | Malformed] = []
        characters, prompts = 0, set[str]()  # a prompt is encoded once for all of its responses in a chunk
        for row in itertools.islice(self.records, skip, None):
            chunk.append(row)
            for example in _examples(row):
                prompt = text_of(example.prompt)
                characters += len(text_of(example.response)) + (0 if prompt in prompts else len(prompt))
                prompts.add(prompt)
            if len(chunk) == self.options.chunk_rows or characters >= MAX_CHUNK_CHARACTERS:
                yield chunk
                characters, prompts, chunk = 0, set(), []
        if chunk:
            yield chunk


def _examples(row: Record | Malformed) -> list[Example]:
    return [] if isinstance(row, Malformed) else row.examples


def _template(verifier: Verifier) -> str:
    template = verifier.renderer.template
    return "its chat template" if template is None else f"the template {template!r}"


def _with_budgets(
    verifiers: Mapping[str, Verifier], given: int | None, began_with: Mapping[str, int] | None
) -> dict[str, Verifier]:
    """With the tokens per pass that the user says, or that the run began with: a resumed run makes the same
    passes, whatever memory is free."""
    budgets = dict.fromkeys(verifiers, given) if given else began_with
    budgets = budgets or {name: token_budget(verifier.model) for name, verifier in verifiers.items()}
    return {name: replace(verifier, max_batch_tokens=budgets[name]) for name, verifier in verifiers.items()}


def _warn_of_other_passes(began_with: Mapping[str, int] | None, verifiers: Mapping[str, Verifier]) -> None:
    # It may have to be lowered for the run to be resumed at all
    for name, before in (began_with or {}).items():
        if before != (after := verifiers[name].max_batch_tokens):
            say(
                f"warning: {name} began with {before} tokens per pass and resumes with {after}: the last digits "
                "of the remaining scores may differ from those of an uninterrupted run"
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


def _kept(partial: Partial) -> Iterator[Added]:
    return (Malformed(*row) if isinstance(row, list) else row for row in partial.rows())


def _list_malformed(path: Path, partial: Partial, summary: Summary, replaces: bool) -> None:
    lines = (row for row in _kept(partial) if isinstance(row, Malformed))
    if summary.num_malformed:
        write_malformed(path, lines)
    elif replaces:
        path.unlink(missing_ok=True)  # the list of the output that this one has replaced


def _check_names(options: Options) -> None:
    names = [verifier.name for verifier in options.verifiers]
    for name in names:
        if names.count(name) > 1:
            raise CMEError(
                f"two verifiers are called {name!r}: give them names, --verifier a=MODEL --verifier b=MODEL"
            )


def _check_paths(options: Options) -> None:
    output = options.output
    format_of(output, OUTPUT_FORMATS)
    folder = followed(output).parent
    if not folder.is_dir():
        raise CMEError(f"there is no folder {str(folder)!r} for the output: make it first")
    if output.is_dir():
        raise CMEError(f"the output {str(output)!r} is a folder: name a file")
    if output.exists() and not output.is_file():
        raise CMEError(f"the output {str(output)!r} is a device or a pipe: name a file, or - for standard output")
    for path in (output, malformed_of(output)):
        if path.exists() and options.input.exists() and path.samefile(options.input):
            raise CMEError("the output would replace the input: name another file")


def _check_free(path: Path, options: Options, partial: Partial) -> None:
    if path.exists() and not options.overwrite and partial.header() is None:
        raise CMEError(f"{path} exists: name another file, or replace it with --overwrite")
