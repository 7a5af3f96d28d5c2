"""A file, or a task -> the data of a run."""

from __future__ import annotations

from pathlib import Path

from cme.errors import CMEError, DatasetError
from cme.evaluation.correctness.data import Data, Response
from cme.evaluation.correctness.file import read_file
from cme.evaluation.correctness.options import Options
from cme.files.tables import FORMATS, open_table
from cme.tasks.matchers import Task
from cme.tasks.questions import SPLITS
from cme.tasks.registry import find_task


def load_data(options: Options) -> Data:
    """Raises CMEError if there is no such file or task, or if it lacks what is needed."""
    suffix = Path(options.data).suffix.lower()
    if suffix in FORMATS or "/" in options.data or Path(options.data).is_file():
        return read_file(open_table(Path(options.data)), options)
    return _from_task(find_task(options.data), options)


def _from_task(task: Task, options: Options) -> Data:
    for option, value in (("--matcher", options.matcher), ("--span-column", options.span_column)):
        if value is not None:
            raise CMEError(f"{option} is for files: the task {task.name!r} has its own matcher")
    splits = SPLITS[::-1] if options.split == "all" else (options.split,)  # held-out questions first
    questions = [question for split in splits for question in task.load(split)][: options.limit]
    about = f"{task.name}: {task.about}; {len(questions)} questions, split {options.split}"
    if not questions:
        raise DatasetError(f"the task {task.name!r} has no questions in its split {options.split!r}")
    if options.generator is not None and not options.candidates:
        return Data(about, questions=questions, matcher=task.matcher, package=task.package)
    if not all(question.choices for question in questions):
        raise CMEError(
            f"the task {task.name!r} has no options to choose from: name the model whose responses are judged "
            "with --generator" + (", without --candidates" if options.candidates else "")
        )
    responses = [
        Response(q.id, q.text, q.text, choice, choice in q.answers, None, choice)
        for q in questions
        for choice in q.choices
    ]
    return Data(about, responses=responses, sampled=False, package=task.package)
