"""Prompts to train on and to evaluate with, and how to tell a right answer where there is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from cme.errors import DatasetError
from cme.files.records import COLUMNS, Columns, RowProblem, input_problem, read_prompt, read_records
from cme.files.tables import FORMATS, is_table
from cme.tasks.matchers import Task
from cme.tasks.questions import Question
from cme.tasks.registry import TASKS, find_task, is_task
from cme.text.messages import text_of
from cme.text.rendering import encode_prompt

Judge = Callable[[str, Mapping[str, Any]], bool]
"""Tells from a response's text and its row of the dataset if it is right."""


@dataclass(frozen=True)
class Prompts:
    """Datasets with a column `prompt`, in TRL's form. Nothing else is used to train.

    Attributes:
        held_out: prompts that training does not see, if any.
        judge: tells right from wrong, for measurement; None where nothing does.
    """

    train: Dataset
    held_out: Dataset | None
    judge: Judge | None = None


def load_prompts(
    name: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    prompt_column: str | None = None,
    verifier_prompt_column: str | None = None,
) -> Prompts:
    """Prompts of a task of `cme.tasks`, from a local file or the hub.

    `prompt_column` is by default the first of `cme.files.records.COLUMNS` that is there. A column that no dataset
    can hold is left out with a warning, unless it is one of the two named here.

    Raises:
        DatasetError: says what is missing.
    """
    if is_task(name):
        if config is not None or prompt_column is not None or train_split != "train":
            raise DatasetError(
                f"{name!r} is a task, which has no configurations, columns and splits to choose: leave these "
                "options out, or give the full id of a dataset on the hub, with its owner"
            )
        return _of_task(find_task(name), with_held_out=test_split is not None)
    if is_table(name):
        splits = {"train": _of_file(Path(name), prompt_column, verifier_prompt_column)}
    else:
        splits = _of_hub(name, config)

    def split(wanted: str) -> Dataset:
        if wanted not in splits:
            raise DatasetError(f"the dataset {name!r} has no split {wanted!r}; it has {', '.join(splits)}")
        return splits[wanted] if is_table(name) else _with_prompts(splits[wanted], wanted, name, prompt_column)

    return Prompts(split(train_split), None if test_split is None else split(test_split))


def prepare(
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str = "auto",
    max_tokens: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Prompts:
    """Prompts for the generator that has `tokenizer`.

    Args:
        prompt_format: "chat" turns plain-text prompts into conversations of one message, "text" leaves them
            as they are, "auto" is chat if the tokenizer has a chat template.
        max_tokens: prompts with more tokens are left out.
        chat_template_kwargs: variables of the chat template, which decide how many tokens there are.

    Raises:
        DatasetError: conversations without a chat template to render them, or no prompt that is short enough.
    """
    template = tokenizer.chat_template

    def prepared(dataset: Dataset) -> Dataset:
        plain = isinstance(dataset[0]["prompt"], str)
        chat = not plain or prompt_format == "chat" or (prompt_format == "auto" and template)
        if chat and not template:
            raise DatasetError(
                f"the prompts are conversations, but the generator {tokenizer.name_or_path!r} has no chat "
                "template: take an instruction-tuned model, or give prompts as plain text"
            )
        if chat and plain:
            dataset = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        if max_tokens is None:
            return dataset
        kept = dataset.filter(
            lambda row: len(encode_prompt(tokenizer, row["prompt"], chat_template_kwargs)) <= max_tokens
        )
        if not len(kept):
            raise DatasetError(f"each of the {len(dataset)} prompts has more than {max_tokens} tokens")
        return kept

    held_out = prompts.held_out and prepared(prompts.held_out)
    return replace(prompts, train=prepared(prompts.train), held_out=held_out)


def _of_task(task: Task, with_held_out: bool) -> Prompts:
    """Rows have `prompt`, `question` (without instructions), `answer` (the usual one) and `id`."""
    train, held_out = task.load("train"), task.load("held_out") if with_held_out else []
    questions = {question.id: question for question in (*train, *held_out)}
    return Prompts(
        _rows(train),
        _rows(held_out) if held_out else None,
        lambda text, row: task.matcher.is_correct(text, questions[row["id"]]),
    )


def _rows(questions: Sequence[Question]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": question.prompt,
                "question": question.full_text,
                "answer": next(iter(question.answers), None),
                "id": question.id,
            }
            for question in questions
        ]
    )


def _of_file(path: Path, prompt_column: str | None, verifier_prompt_column: str | None) -> Dataset:
    """A file's rows. Texts stay texts, whatever they look like."""
    named = Columns(prompt_column=prompt_column)
    found = read_records(path, named, needs_responses=False, options=("prompt",))
    records = found.all()
    _check((record.prompt for record in records), str(path))
    columns = {"prompt": _array([record.prompt for record in records], "prompt", path)}
    source = found.layout.prompt or found.layout.messages
    for name in found.table.survey.columns:
        if name in ("prompt", source):
            continue
        try:
            columns[name] = _array([record.row.get(name) for record in records], name, path)
        except DatasetError as error:
            if name == verifier_prompt_column:
                raise
            warnings.warn(f"a column is left out, as it is not used: {error}", stacklevel=2)
    return Dataset.from_dict(columns)


def _array(values: Sequence[Any], column: str, path: Path) -> pyarrow.Array:
    try:
        column.encode()
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise DatasetError(
            f"a dataset can't hold the column {column!r} of {path}, whose values must be of one kind: {error}"
        ) from error


def _of_hub(name: str, config: str | None) -> DatasetDict:
    try:
        return load_dataset(name, config)
    except DatasetNotFoundError as error:
        raise DatasetError(
            f"there is no dataset {name!r}: give a task ({', '.join(TASKS)}, or one of reasoning-gym), a file "
            f"({', '.join(FORMATS)}), or a hub id"
        ) from error
    except Exception as error:  # readers of every format raise their own
        cause = error.__cause__ or error
        raise DatasetError(f"could not load the dataset {name!r}: {type(cause).__name__}: {cause}") from error


def _with_prompts(dataset: Dataset, split: str, name: str, column: str | None) -> Dataset:
    """A dataset of the hub, its prompts in the column `prompt`."""
    names = dataset.column_names
    found = column or next((usual for usual in COLUMNS["prompt"] if usual in names), COLUMNS["prompt"][0])
    if found not in names:
        raise DatasetError(
            f"the dataset {name!r} has no column {found!r}; it has {', '.join(names)}. "
            "Name the one with the prompts with --prompt-column."
        )
    problem = input_problem(found, column, options=("prompt",))
    if problem is not None and "input" in names and any(dataset["input"]):
        raise DatasetError(f"the prompts of {name!r} can't be read: {problem}")
    if found != "prompt":
        dataset = dataset.remove_columns("prompt") if "prompt" in names else dataset
        dataset = dataset.rename_column(found, "prompt")
    _check(dataset["prompt"], f"the split {split!r} of {name!r}")
    return dataset


def _check(prompts: Iterable[Any], source: str) -> None:
    """Raise DatasetError unless all prompts are texts, or all are conversations, and none is empty."""
    kinds: set[bool] = set()
    for number, prompt in enumerate(prompts, 1):
        try:
            text = text_of(read_prompt(prompt))
            text.encode()
        except (RowProblem, UnicodeEncodeError) as error:
            raise DatasetError(f"row {number} of {source} has no usable prompt: {error}") from error
        if not text.strip():
            raise DatasetError(f"row {number} of {source} has an empty prompt")
        kinds.add(isinstance(prompt, str))
        if len(kinds) > 1:
            raise DatasetError(
                f"row {number} of {source} has {'a text' if isinstance(prompt, str) else 'a conversation'} as its "
                "prompt, unlike the rows before: write all of them as texts, or all as lists of messages"
            )
