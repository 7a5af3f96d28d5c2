"""One run of `cme score`."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cme.engine.memory import token_budget
from cme.errors import CMEError
from cme.files.atomic import beside, followed, locked
from cme.files.partial import Partial, partial_of
from cme.files.tables import OUTPUT_FORMATS, STANDARD, Malformed, format_of
from cme.fingerprint import fingerprint
from cme.score_file.job import Job, say
from cme.score_file.options import Options
from cme.score_file.summary import Progress, Summary
from cme.score_file.write import Added, Output, malformed_of, write_malformed
from cme.verifier import Verifier

_BUDGETS = "tokens_per_pass"  # in the partial file's first line


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
        job = Job.of(options)
        if job.table.survey.malformed:
            _check_free(malformed_of(options.output), options, partial)
        output = Output(job.table, options.output, job.columns)
        verifiers, done = _begin_or_resume(job, partial)
        with Progress(job.table.survey.rows, done, options.progress) as progress:
            for added in job.score(verifiers, done, progress):
                partial.append([[row.line, row.reason] if isinstance(row, Malformed) else row for row in added])
        summary = Summary(job.columns, session=progress.rate())
        _write(output, partial, summary)
        partial.delete()
        _warn_of_nonsense(summary, verifiers)
        return summary


def _begin_or_resume(job: Job, partial: Partial) -> tuple[dict[str, Verifier], int]:
    """The verifiers, and the number of rows that are scored already.

    Raises CMEError if those were scored with another input, other options or other verifiers.
    """
    identity = {"input": {"sha256": job.table.sha256}, "options": job.options.identity()}
    partial.check(identity)
    verifiers = {name: verifier.at(partial.began) for name, verifier in job.load().items()}
    identity["verifiers"] = {name: fingerprint(verifier) for name, verifier in verifiers.items()}
    partial.check(identity)
    for name, found in identity["verifiers"].items():
        template = verifiers[name].renderer.template
        told = "its chat template" if template is None else f"the template {template!r}"
        say(f"{name}: {found['dtype']} on {found['device']}, {told}")
    began_with = (partial.header() or {}).get(_BUDGETS)
    verifiers = _with_budgets(verifiers, job.options.models.max_batch_tokens, began_with)
    done = partial.start({**identity, _BUDGETS: {name: v.max_batch_tokens for name, v in verifiers.items()}})
    if done:
        say(f"{done:,} of {job.table.survey.rows:,} rows were scored before; resuming")
        _warn_of_other_passes(began_with, verifiers)
    return verifiers, done


def _score_to_standard_output(options: Options) -> Summary:
    """Rows are written chunk by chunk, and nothing is kept for a later run.

    Raises CMEError if there is no standard output, or its reader has left.
    """
    if sys.stdout is None:
        raise CMEError("standard output is closed: name a file with --output")
    job = Job.of(options)
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


def _write(output: Output, partial: Partial, summary: Summary) -> None:
    """The output, and the list of the malformed lines if there are any."""
    malformed, replaces = malformed_of(output.path), output.path.exists()
    output.write(summary.observe(_kept(partial)))
    if summary.num_malformed:
        write_malformed(malformed, (row for row in _kept(partial) if isinstance(row, Malformed)))
    elif replaces:
        malformed.unlink(missing_ok=True)  # the list of the output that this one has replaced


def _kept(partial: Partial) -> Iterator[Added]:
    return (Malformed(*row) if isinstance(row, list) else row for row in partial.rows())


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
