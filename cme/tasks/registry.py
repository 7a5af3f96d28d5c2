"""Tasks and matchers by name."""

from __future__ import annotations

from cme.errors import CMEError
from cme.tasks.capitals import CAPITALS
from cme.tasks.expressions import MATH
from cme.tasks.generated import ARITHMETIC, generated_task, names
from cme.tasks.matchers import CHOICE, CONTAINS, EXACT, NUMERIC, Matcher, Task
from cme.tasks.packaged import CIVICS, SYMBOLS

TASKS: dict[str, Task] = {task.name: task for task in (CAPITALS, CIVICS, SYMBOLS, ARITHMETIC)}

MATCHERS = {"exact": EXACT, "contains": CONTAINS, "numeric": NUMERIC, "math": MATH, "choice": CHOICE}
"""For files with gold answers."""


def is_task(name: str) -> bool:
    return name in TASKS or name in names()


def find_task(name: str) -> Task:
    """The task called `name`: one of TASKS, or any data set of reasoning-gym.

    Raises CMEError, with the known names, if there is none.
    """
    if name in TASKS:
        return TASKS[name]
    if name in names():
        return generated_task(name)
    missing = "" if names() else " (which is not installed: pip install 'cme[eval]')"
    raise CMEError(
        f"there is no task {name!r}: give {', '.join(TASKS)}, or a data set of reasoning-gym{missing}. Benchmarks "
        "such as gsm8k and mmlu are read from the file samples_….jsonl that `lm_eval --log_samples` writes"
    )


def find_matcher(name: str) -> Matcher:
    """Raises CMEError, with the known names, if there is none called `name`."""
    if name not in MATCHERS:
        raise CMEError(f"there is no matcher {name!r}: give {', '.join(MATCHERS)}")
    return MATCHERS[name]
