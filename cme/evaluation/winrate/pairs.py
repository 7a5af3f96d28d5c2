"""Files of prompts, responses and annotations, and which response belongs to which prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cme.errors import DatasetError
from cme.evaluation.winrate.outcomes import Outcome
from cme.evaluation.winrate.verdict import shown
from cme.files.records import Columns, Layout, find_layout, record_of
from cme.files.tables import Malformed, Row, Table, open_table
from cme.text.messages import Messages, text_of


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    id: from the file; where files have none, the text.
    dataset: the part of a collection that it is from, as in AlpacaEval's files.
    """

    id: str
    prompt: str | Messages
    dataset: str | None = None


@dataclass(frozen=True)
class Contestant:
    """A model by its name, and its responses by the prompts' ids."""

    name: str
    responses: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """A row of a file, None where the file has no such column. `where` tells a user which row it is."""

    id: str | None
    prompt: str | Messages
    response: str | None
    dataset: str | None
    generator: str | None
    where: str

    @property
    def text(self) -> str:
        return text_of(self.prompt).strip()


def read(path: Path, *, responses: bool = True) -> list[Entry]:
    """A file of responses, or of prompts alone. Raises DatasetError, which names the row that is wrong."""
    table = open_table(path)
    layout = find_layout(table, Columns(), needs_responses=responses)
    if not responses and layout.prompt is not None:
        layout = replace(layout, response=None)  # AlpacaEval's prompts have a reference's
    return [_entry(row, number, layout, path) for number, row in enumerate(_rows(table), 1)]


def by_key(entries: Sequence[Entry], by_id: bool) -> dict[str, Entry]:
    """By the ids, or by the texts of the prompts. Raises DatasetError if two are the same."""
    found: dict[str, Entry] = {}
    for entry in entries:
        key = str(entry.id) if by_id else entry.text
        if key in found:
            name, remedy = ("id", "") if by_id else ("prompt", ", or give the rows ids")
            raise DatasetError(
                f"{entry.where} has the {name} {key[:80]!r} of {found[key].where}: keep one of them{remedy}"
            )
        found[key] = entry
    return found


def prompts_of(files: Sequence[Mapping[str, Entry]]) -> list[Prompt]:
    """All prompts, in order of their first mention. Raises DatasetError if one id stands for several."""
    first: dict[str, Entry] = {}
    for key, entry in itertools.chain(*(file.items() for file in files)):
        known = first.setdefault(key, entry)
        if known.text != entry.text:
            raise DatasetError(
                f"{entry.where} has another prompt under the id {key!r} than {known.where}: {entry.text!r:.80}, "
                f"not {known.text!r:.80}. The files must be about the same prompts."
            )
    return [Prompt(key, entry.prompt, entry.dataset) for key, entry in first.items()]


def _rows(table: Table) -> Iterator[Row]:
    for row in table.rows():
        if isinstance(row, Malformed):
            raise DatasetError(f"line {row.line} of {table.path} can't be read: {row.reason}")
        yield row


def _entry(row: Row, number: int, layout: Layout, path: Path) -> Entry:
    record, where = record_of(row, layout, number), f"row {number} of {path}"
    problem = next((example.problem for example in record.examples if example.problem is not None), None)
    if problem is not None:
        raise DatasetError(f"{where} can't be compared: {problem} (an empty response is an empty text)")
    if record.prompt is None or len(record.examples) > 1:
        raise DatasetError(f"{where} has {len(record.examples)} responses, not one text")
    entry = Entry(
        id=None if row.get("id") is None else str(row["id"]),
        prompt=record.prompt,
        response=text_of(record.examples[0].response) if record.examples else None,
        dataset=row.get("dataset"),
        generator=row.get("generator"),
        where=where,
    )
    if not entry.text:
        raise DatasetError(f"{where} has no prompt: it is empty")
    return entry


def read_annotations(path: Path) -> dict[tuple[str, str], list[Outcome]]:
    """The outcomes in a file of AlpacaEval's annotations, by the names of A and B.

    There `output_1` is the reference's, which is B here, `output_2` the model's, which is A, and `preference` is 1
    for the first, 2 for the second, 1.5 for a tie, anything between for a judge that gives probabilities, null for
    a failure. Raises DatasetError if the file holds something else.
    """
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for number, row in enumerate(_rows(open_table(path)), 1):
        names = str(row.get("generator_2", "A")), str(row.get("generator_1", "B"))
        a, b = row.get("output_2"), row.get("output_1")
        length_a, length_b = (len(output) if isinstance(output, str) else None for output in (a, b))
        share = _share(row, f"row {number} of {path}")
        outcomes.setdefault(names, []).append(
            Outcome(share, length_a, length_b, identical=a is not None and a == b)
        )
    return outcomes


def _share(row: Row, where: str) -> float | None:
    if "preference" not in row:
        raise DatasetError(f"{where} has no preference: is it a file of annotations, not of outputs?")
    value = row["preference"]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or 1 <= value <= 2):
        raise DatasetError(f"{where} has the preference {value!r}: it must be a number from 1 to 2, or null")
    return 0.5 if value == 0 else value - 1  # early annotations have 0 for a tie


def annotations_of(
    prompts: Sequence[Prompt], outcomes: Sequence[Outcome], a: Contestant, b: Contestant, annotator: str
) -> list[dict[str, Any]]:
    """The annotations of one comparison, in AlpacaEval's format. `preference` is the mean over both orders."""
    return [
        {
            "id": prompt.id,
            "dataset": prompt.dataset,
            "instruction": shown(prompt.prompt),
            "generator_1": b.name,
            "output_1": b.responses[prompt.id],
            "generator_2": a.name,
            "output_2": a.responses[prompt.id],
            "annotator": annotator,
            "preference": None if outcome.share is None else 1 + outcome.share,
            "verdict_model_shown_first": outcome.orders[0] if outcome.orders else None,
            "verdict_reference_shown_first": outcome.orders[1] if outcome.orders else None,
        }
        for prompt, outcome in zip(prompts, outcomes, strict=True)
    ]
