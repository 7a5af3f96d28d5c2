"""The reader of all commands: prompts, responses, and whether these ended by themselves."""

import json

import pytest

from cme.errors import DatasetError
from cme.files.records import Columns, Example, all_records, find_column, read_finished, read_records
from cme.files.tables import Malformed, open_table


@pytest.fixture
def read(tmp_path):
    """The records of rows, or of the text of a file."""

    def records(content, name="in.jsonl", columns=None, **how):
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return list(read_records(tmp_path / name, columns, **how))

    return records


@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction"])
@pytest.mark.parametrize("response", ["response", "completion", "output"])
def test_usual_names_are_found(read, prompt, response):
    (record,) = read([{"id": 3, prompt: "Hi", response: "Ho", "finish_reason": "stop"}])
    assert (record.number, record.prompt, record.row["id"]) == (1, "Hi", 3)
    assert record.examples == [Example("Hi", "Ho", True)]
    (many,) = read([{prompt: "Hi", response + "s": ["a", None], "finished": [True, False]}])
    assert many.examples == [Example("Hi", "a", True), Example(problem="the response is missing")]


def test_the_preferred_name_comes_first_and_options_name_others(read, tmp_path):
    row = {"instruction": "a", "question": "b", "output": "c", "response": "d", "odd": "e"}
    (record,) = read([row])
    assert record.examples == [Example("b", "d")]
    (named,) = read([row], columns=Columns(prompt_column="odd", response_column="output", all_finished=True))
    assert named.examples == [Example("e", "c", True)]
    table = open_table(tmp_path / "in.jsonl")
    assert find_column(table, None, "answer") is None
    assert find_column(table, "odd", "answer") == "odd"
    with pytest.raises(DatasetError, match=r"no column 'x'; it has instruction, .*odd\. Name .* --answer-column"):
        find_column(table, "x", "answer")


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({}, "Name the right one with --prompt-column or --messages-column."),
        ({"options": ("prompt",)}, "Name the right one with --prompt-column."),
        ({"options": ()}, "Rename the right one."),
    ],
)
def test_an_error_names_only_options_that_the_command_has(read, options, remedy):
    with pytest.raises(DatasetError, match=f"it has text, response. {remedy}$"):
        read([{"text": "Hi", "response": "Ho"}], **options)


def test_names_of_alpaca_eval_come_before_others_in_its_files(read):
    row = {"question": "a", "instruction": "b", "completion": "c", "responses": ["d"], "output": "e"}
    assert read([row])[0].examples == [Example("a", "d")]
    assert read([{**row, "generator": "m"}])[0].examples == [Example("b", "e")]
    preferred = {**row, "generator": "m", "prompt": "p", "response": "r"}
    assert read([preferred])[0].examples == [Example("p", "r")]


def test_an_instruction_with_an_input_is_not_the_whole_prompt(read):
    rows = [{"instruction": "Add.", "input": part, "output": "5"} for part in ("2, 3", "", None)]
    first, *others = read(rows)
    problem = first.examples[0].problem
    assert problem.startswith("the column `input` belongs to the prompt")
    assert problem.endswith("or name the prompt with --prompt-column")
    assert first.prompt is None
    assert [record.examples for record in others] == [[Example("Add.", "5")]] * 2
    assert "--prompt-column" not in read(rows, options=())[0].examples[0].problem
    assert read(rows, columns=Columns(prompt_column="instruction"))[0].examples == [Example("Add.", "5")]
    assert read([{**rows[0], "prompt": "Add. 2, 3"}])[0].examples == [Example("Add. 2, 3", "5")]


def test_prompts_may_be_in_another_file(read):
    rows = [{"id": 1, "response": "a"}, {"id": 2, "prompt": "Hi", "response": "b"}]
    records = read(rows, needs_prompts=False)
    assert [record.prompt for record in records] == [None, "Hi"]
    assert [record.examples for record in records] == [[Example("", "a")], [Example("Hi", "b")]]
    assert read(rows[:1], needs_prompts=False)[0].prompt is None
    (bad,) = read([{"prompt": 3, "response": "a"}], needs_prompts=False)
    assert bad.examples[0].problem == "the prompt is neither a text nor a list of messages but int"


def test_a_prompt_is_read_whatever_its_response_is(read):
    rows = [{"prompt": "Hi", "output": bad} for bad in ("a text", None, {"score": 3}, ["a", "b"])]
    records = read(rows, needs_responses=False)
    assert [record.prompt for record in records] == ["Hi"] * 4
    assert [record.examples[0].problem is None for record in records] == [True, False, False, False]


def test_a_file_of_prompts_has_no_responses(read):
    records = read([{"prompt": "Hi", "id": 1}, {"prompt": 3}, {"prompt": None}], needs_responses=False)
    assert [record.prompt for record in records] == ["Hi", None, None]
    assert records[0].examples == []
    assert [record.examples[0].problem for record in records[1:]] == [
        "the prompt is neither a text nor a list of messages but int",
        "the prompt is missing",
    ]
    with pytest.raises(
        DatasetError, match=r"has no column 'response', 'responses', .* or 'outputs'; it has prompt"
    ):
        read([{"prompt": "Hi"}])


def test_cells_of_csv_that_hold_json_are_read_and_malformed_lines_have_their_place(read):
    content = 'question,responses,finished\nHi,"[""a"", ""b""]","[true, false]"\nHo\nHu,"[""c""]",\n'
    first, bad, last = read(content, "in.csv")
    assert first.examples == [Example("Hi", "a", True), Example("Hi", "b", False)]
    assert first.row["responses"] == ["a", "b"]
    assert isinstance(bad, Malformed)
    assert (last.number, last.examples) == (3, [Example("Hu", "c")])


def test_conversations_are_split_before_their_last_message(read):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    good, bad = read([{"messages": turns}, {"messages": turns[:1]}])
    assert (good.prompt, good.examples) == (turns[:1], [Example(turns[:1], "Ho")])
    assert (bad.prompt, bad.examples[0].problem) == (None, "the last message is from 'user', not from 'assistant'")


def test_finish_reasons_of_every_library_are_known():
    ended = [True, 1, 1.0, "stop", "eos", "EOS_TOKEN", "end_turn", "stop_sequence", "true"]
    assert [read_finished(reason) for reason in ended] == [True] * len(ended)
    cut = [False, 0, 0.0, "length", "max_tokens", "MAX_LENGTH", "false"]
    assert [read_finished(reason) for reason in cut] == [False] * len(cut)
    assert [read_finished(reason) for reason in (None, "odd", 0.5, "", "abort")] == [None] * 5


@pytest.mark.parametrize(
    ("line", "needs_responses", "message"),
    [
        ("nonsense", False, "line 2 of .*in.jsonl can't be read: not JSON"),
        ('{"prompt": 3, "response": "b"}', False, "row 2 of .*in.jsonl can't be read: the prompt is"),
        ('{"prompt": "a"}', True, "row 2 of .*in.jsonl can't be read: the response is missing"),
        ('{"prompt": "a"}', False, None),
    ],
)
def test_a_row_that_is_needed_and_cannot_be_read_is_an_error(tmp_path, line, needs_responses, message):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    if message is None:
        assert len(all_records(path, needs_responses=needs_responses)) == 2
    else:
        with pytest.raises(DatasetError, match=message):
            all_records(path, needs_responses=needs_responses)
