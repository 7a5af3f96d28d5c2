"""Who is compared, on which prompts, with which responses: read from files, or generated."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cme.errors import CMEError, DatasetError
from cme.evaluation.report import write_json_lines
from cme.evaluation.winrate.options import Options
from cme.files.records import COLUMNS, Record, all_records
from cme.files.tables import is_table
from cme.options import model_name, named
from cme.text.messages import Messages, text_of


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the other columns of its row.

    Attributes:
        prompt: empty in a row of responses without one, which its id then matches with a prompt of another file.
        id: empty where a file has none; the text then, once prompts are matched.
        response: None in a file of prompts.
        dataset: the part of a collection that it is from, as in AlpacaEval's files.
        generator: the model that wrote the response; empty where a file does not say.
        where: the row, for error messages.
    """

    id: str
    prompt: str | Messages
    response: str | None = None
    dataset: Any = None
    generator: str = ""
    where: str = ""

    @property
    def text(self) -> str:
        return text_of(self.prompt).strip()


@dataclass(frozen=True)
class Contestant:
    """A model, or a file of responses, which has `rows`. `responses` are by the prompts' ids."""

    name: str
    model: str
    rows: Sequence[Prompt] | None = None
    responses: Mapping[str, str] = field(default_factory=dict)


def contestants_of(values: Sequence[str]) -> list[Contestant]:
    """From the words of a command line. Those of one name are told apart by the whole of what they were called."""
    found = [_contestant(value) for value in values]
    count = Counter(contestant.name for contestant in found)
    found = [replace(c, name=c.model) if count[c.name] > 1 else c for c in found]
    ((name, times),) = Counter(contestant.name for contestant in found).most_common(1)
    if times > 1:
        raise CMEError(f"two contestants are called {name!r}: give them names, as in before={name} after={name}")
    return found


def _contestant(value: str) -> Contestant:
    name, model = named(value)
    if not is_table(model):
        return Contestant(name or model_name(model), model)
    rows = read(Path(model))
    generators = {row.generator for row in rows}
    return Contestant(name or (len(generators) == 1 and generators.pop()) or Path(model).stem, model, rows)


def with_responses(contestants: Sequence[Contestant], options: Options) -> tuple[list[Prompt], list[Contestant]]:
    """The prompts that are compared, and the contestants with their responses, which belong to prompts by ids if
    every row has one, else by the texts of the prompts."""
    given = [] if options.prompts is None else [read(options.prompts, responses=False)]
    files = [*given, *(c.rows for c in contestants if c.rows is not None)]
    if not files:
        raise CMEError("there are no prompts: name a file of them with --prompts")
    by_id = all(row.id for rows in files for row in rows)
    prompts = matched([by_key(rows, by_id) for rows in files])
    prompts = prompts[: len(given[0]) if given else None][: options.limit]
    prompts = _with_texts(prompts, options.only_common)
    answered = [replace(c, responses=_responses(c, prompts, by_id, options)) for c in contestants]
    return _answered_by_all(prompts, answered, options.only_common), answered


def _with_texts(prompts: Sequence[Prompt], only_common: bool) -> list[Prompt]:
    known = [prompt for prompt in prompts if prompt.text]
    if len(known) < len(prompts) and not (known and only_common):
        missing = next(prompt for prompt in prompts if not prompt.text)
        raise DatasetError(
            f"{missing.where} has no prompt, and no other file has one with its id {missing.id!r:.80}: name a "
            "file of prompts, with ids, with --prompts"
        )
    if len(known) < len(prompts):
        print(
            f"{len(prompts) - len(known)} of {len(prompts)} ids are left out: no file has a prompt",
            file=sys.stderr,
        )
    return known


def _responses(contestant: Contestant, prompts: Sequence[Prompt], by_id: bool, options: Options) -> dict[str, str]:
    if contestant.rows is None:
        return generated_responses(contestant, prompts, options)
    return {key: row.response or "" for key, row in by_key(contestant.rows, by_id).items()}


def _answered_by_all(
    prompts: Sequence[Prompt], contestants: Sequence[Contestant], only_common: bool
) -> list[Prompt]:
    for contestant in contestants:
        missing = [prompt for prompt in prompts if prompt.id not in contestant.responses]
        if missing and not only_common:
            raise DatasetError(
                f"{contestant.name} has no response to {len(missing)} of {len(prompts)} prompts, the first is "
                f"{missing[0].id!r:.80}. Answer them, or leave them out with --only-common."
            )
    common = [prompt for prompt in prompts if all(prompt.id in c.responses for c in contestants)]
    if not common:
        raise DatasetError("no prompt has a response from everybody: the files are about different prompts")
    if len(common) < len(prompts):
        left_out = len(prompts) - len(common)
        print(f"{left_out} of {len(prompts)} prompts are left out: not all answered", file=sys.stderr)
    return common


def read(path: Path, *, responses: bool = True) -> list[Prompt]:
    """A file of responses, or of prompts alone. Raises DatasetError, which names the row that is wrong."""
    records = all_records(path, needs_responses=responses, needs_prompts=not responses)
    return [_prompt(record, responses, path) for record in records]


def _prompt(record: Record, has_response: bool, path: Path) -> Prompt:
    row, where = record.row, f"row {record.number} of {path}"
    if has_response and len(record.examples) != 1:
        raise DatasetError(
            f"{where} has {len(record.examples)} responses, not one text: keep one, for a comparison is of one "
            "response per prompt"
        )
    if record.prompt is not None and not text_of(record.prompt).strip():
        raise DatasetError(f"{where} has no prompt: it is empty")
    return Prompt(
        id=_text(row.get("id")),
        prompt=record.prompt or "",
        response=text_of(record.examples[0].response) if has_response else None,
        dataset=row.get("dataset"),
        generator=_text(row.get("generator")),
        where=where,
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def by_key(rows: Sequence[Prompt], by_id: bool) -> dict[str, Prompt]:
    """By the ids, or by the texts of the prompts. Raises DatasetError if two are the same."""
    found: dict[str, Prompt] = {}
    for row in rows:
        key = row.id if by_id else row.text
        if not key:
            raise DatasetError(
                f"{row.where} has no prompt ({', '.join(COLUMNS['prompt'])}), and not every row of all files has "
                "an id: give every row a prompt"
            )
        if key in found:
            name, remedy = ("id", "") if by_id else ("prompt", ", or give the rows ids")
            raise DatasetError(
                f"{row.where} has the {name} {key!r:.80} of {found[key].where}: keep one of them{remedy}"
            )
        found[key] = row
    return found


def matched(files: Sequence[Mapping[str, Prompt]]) -> list[Prompt]:
    """All prompts, in order of their first mention. Raises DatasetError if one id stands for several."""
    first: dict[str, Prompt] = {}
    for key, row in itertools.chain(*(file.items() for file in files)):
        known = first.setdefault(key, replace(row, id=key))
        if not row.text:
            continue
        if not known.text:
            first[key] = replace(known, prompt=row.prompt, where=row.where)
        elif known.text != row.text:
            raise DatasetError(
                f"{row.where} has another prompt under the id {key!r} than {known.where}: {row.text!r:.80}, not "
                f"{known.text!r:.80}. The files must be about the same prompts."
            )
    return list(first.values())


def generated_responses(contestant: Contestant, prompts: Sequence[Prompt], options: Options) -> dict[str, str]:
    """A model's responses by the prompts' ids, also written to `options.output`/responses/NAME.jsonl.

    Those that are generated already are in `options.output`/journal, in a file per model, set of prompts and way
    to generate. Raises ModelError if the model can't be loaded, DatasetError if a prompt is too long for it.
    """
    from cme.evaluation.generate import identity, sample  # brings torch

    assert options.output is not None
    ids, texts = [prompt.id for prompt in prompts], [prompt.prompt for prompt in prompts]
    header = identity(contestant.model, texts, options.generation, options.models)
    digest = hashlib.sha256(json.dumps([header, ids], sort_keys=True).encode()).hexdigest()[:12]
    file_name = re.sub(r"[^\w.-]", "_", contestant.name)
    generated = sample(
        contestant.model,
        texts,
        options.generation,
        options.models,
        options.output / "journal" / f"{file_name}-{digest}.jsonl",
        ids=ids,
        header=header,
        title=f"responses of {contestant.name}",
        progress=options.progress,
    )
    responses = {prompt.id: response.text.strip() for prompt, response in zip(prompts, generated, strict=True)}
    rows = [
        {"id": prompt.id, "prompt": prompt.prompt, "response": responses[prompt.id], "finished": response.finished}
        for prompt, response in zip(prompts, generated, strict=True)
    ]
    (options.output / "responses").mkdir(exist_ok=True)
    write_json_lines(options.output / "responses" / f"{file_name}.jsonl", rows)
    return responses
