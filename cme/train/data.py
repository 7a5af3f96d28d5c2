"""Prompts to train on and to evaluate with, and how to tell a right answer where there is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from cme.errors import DatasetError
from cme.files.records import RowProblem, read_prompt
from cme.files.tables import FORMATS, Malformed, Row, open_table
from cme.tasks.matchers import Task
from cme.tasks.questions import Question
from cme.tasks.registry import TASKS, find_task, is_task
from cme.text.rendering import encode_prompt, text_of

Judge = Callable[[str, Mapping[str, Any]], bool]
"""Whether a response is right, from its text and its row of the dataset."""


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
    prompt_column: str = "prompt",
    verifier_prompt_column: str | None = None,
) -> Prompts:
    """Prompts of a task of `cme.tasks`, from a local file or the hub.

    A column of a file that no dataset can hold is left out with a warning, unless it is one of the two named here.

    Raises:
        DatasetError: says what is missing.
    """
    if is_task(name):
        if config is not None or prompt_column != "prompt" or train_split != "train":
            raise DatasetError(
                f"{name!r} is a task, which has no configurations, columns and splits to choose: leave these "
                "options out, or give the full id of a dataset on the hub, with its owner"
            )
        return _of_task(find_task(name), with_held_out=test_split is not None)
    splits = _load(name, config, prompt_column, verifier_prompt_column)
    return Prompts(
        _prompts(splits, train_split, name, prompt_column),
        None if test_split is None else _prompts(splits, test_split, name, prompt_column),
    )


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str = "auto",
    max_tokens: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """`dataset` with prompts for the generator that has `tokenizer`.

    Args:
        prompt_format: "chat" turns plain-text prompts into conversations of one message, "text" leaves them
            as they are, "auto" is chat if the tokenizer has a chat template.
        max_tokens: prompts with more tokens are left out.
        chat_template_kwargs: variables of the chat template, which decide how many tokens there are.

    Raises:
        DatasetError: conversations without a chat template to render them, or no prompt that is short enough.
    """
    plain = isinstance(dataset[0]["prompt"], str)
    chat = not plain or prompt_format == "chat" or (prompt_format == "auto" and bool(tokenizer.chat_template))
    if chat and not tokenizer.chat_template:
        raise DatasetError(
            f"the prompts are conversations, but the generator {tokenizer.name_or_path!r} has no chat template: "
            "take an instruction-tuned model, or give prompts as plain text"
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


def _load(name: str, config: str | None, prompt_column: str, verifier_prompt_column: str | None) -> DatasetDict:
    path = Path(name)
    if path.suffix.lower() in FORMATS:
        return DatasetDict(train=_read(path, prompt_column, verifier_prompt_column))
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


def _read(path: Path, prompt_column: str, verifier_prompt_column: str | None) -> Dataset:
    """A file's rows. Texts stay texts, whatever they look like."""
    table = open_table(path)
    rows = [_row(row, path) for row in table.rows()]
    if prompt_column in table.survey.columns:
        _check((row.get(prompt_column) for row in rows), str(path))  # while it is known which row has what
    columns = {}
    for name in table.survey.columns:
        try:
            columns[name] = _array(rows, name, path)
        except DatasetError as error:
            if name in (prompt_column, verifier_prompt_column):
                raise
            warnings.warn(f"a column is left out, as it is not used: {error}", stacklevel=2)
    return Dataset.from_dict(columns)


def _row(row: Row | Malformed, path: Path) -> Row:
    if isinstance(row, Malformed):
        raise DatasetError(f"line {row.line} of {path} can't be read: {row.reason}")
    return row


def _array(rows: Sequence[Row], column: str, path: Path) -> pyarrow.Array:
    try:
        column.encode()
        return pyarrow.array([row.get(column) for row in rows])
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise DatasetError(
            f"a dataset can't hold the column {column!r} of {path}, whose values must be of one kind: {error}"
        ) from error


def _prompts(splits: DatasetDict, split: str, name: str, column: str) -> Dataset:
    if split not in splits:
        raise DatasetError(f"the dataset {name!r} has no split {split!r}; it has {', '.join(splits)}")
    dataset = splits[split]
    if column not in dataset.column_names:
        raise DatasetError(
            f"the dataset {name!r} has no column {column!r}; it has {', '.join(dataset.column_names)}. "
            "Name the one with the prompts with --prompt_column."
        )
    if column != "prompt":
        if "prompt" in dataset.column_names:
            dataset = dataset.remove_columns("prompt")
        dataset = dataset.rename_column(column, "prompt")
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
