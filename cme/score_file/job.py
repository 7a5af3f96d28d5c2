"""The input of a run, scored chunk by chunk."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cme.errors import DatasetError
from cme.files.records import Example, Record, Records
from cme.files.tables import Malformed, Table, open_table
from cme.score_file.columns import AddedColumns, Scores, not_scored
from cme.score_file.options import Options
from cme.score_file.summary import Progress
from cme.score_file.write import Added
from cme.scores import SIGNAL_STATS, ResponseScore
from cme.text.messages import text_of
from cme.verifier import Verifier

MAX_CHUNK_CHARACTERS = 2**18
"""Text in a chunk, however many rows: a chunk is what an interruption loses."""


def say(text: str) -> None:
    """Tell the user about the run, on standard error."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Job:
    """The input of a run, and the columns that it gets."""

    options: Options
    records: Records
    columns: AddedColumns

    @staticmethod
    def of(options: Options) -> Job:
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
        return Job(options, records, columns)

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
                    template=how.template,
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
