"""Sample files of lm-evaluation-harness as prompts, responses and labels.

The files in lm_eval/ were written by lm-evaluation-harness itself (commit 4e7e0d4), from its own definitions of
the tasks, a few questions in the place of the data sets, and a model that gives fixed responses.
"""

import json
from pathlib import Path

import pytest

from cme.cli import main
from cme.errors import DatasetError
from cme.files.records import read_records
from cme.files.tables import open_table

SAMPLES = Path(__file__).parent / "lm_eval"


def rows(path):
    return list(open_table(path).rows())


def changed(tmp_path, name, change):
    lines = [json.loads(line) for line in (SAMPLES / f"samples_{name}.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_generated_responses_are_right_if_any_filter_finds_them_right():
    first, second, third = rows(SAMPLES / "samples_gsm8k.jsonl")
    assert first["prompt"] == "Question: Anna has 3 pens and buys 4 more. How many pens has she?\nAnswer:"
    assert first["responses"] == ["3 + 4 = 7\n#### 7"]
    assert first["answer"] == "3 + 4 = <<3+4=7>>7\n#### 7"
    assert second["responses"] == ["It is 12 times 100, so 1,200."]  # which the strict filter finds wrong
    assert [row["correct"] for row in (first, second, third)] == [[True], [True], [False]]
    assert [row["id"] for row in (first, second, third)] == ["0", "1", "2"]


def test_options_of_a_multiple_choice_question_are_responses():
    bone, organ = rows(SAMPLES / "samples_mmlu_anatomy.jsonl")
    assert bone["prompt"].endswith("Which bone is in the leg?\nA. Ulna\nB. Tibia\nC. Radius\nD. Scapula\nAnswer:")
    assert bone["responses"] == ["A", "B", "C", "D"]
    assert (bone["correct"], bone["answer"]) == ([False, True, False, False], ["B"])
    assert organ["correct"] == [True, False, False, False]
    (stones,) = rows(SAMPLES / "samples_truthfulqa_mc1.jsonl")
    assert stones["responses"] == ["No, they sink.", "Yes, all do.", "Only at night."]
    assert stones["correct"] == [True, False, False]


def test_every_reader_of_records_takes_them():
    records = list(read_records(SAMPLES / "samples_mmlu_anatomy.jsonl"))
    assert [example.response for example in records[0].examples] == ["A", "B", "C", "D"]


@pytest.mark.parametrize(("name", "right"), [("gsm8k", 2), ("mmlu_anatomy", 2)])
def test_a_verifier_is_judged_on_them(tiny_models, tmp_path, name, right):
    args = ["eval", "correctness", str(SAMPLES / f"samples_{name}.jsonl"), "--verifier", tiny_models["verifier"]]
    assert main([*args, "--random-verifiers", "0", "--no-progress", "-o", str(tmp_path / "out")]) == 0
    (result,) = (tmp_path / "out").glob("*.json")
    counts = json.loads(result.read_text())["counts"]
    assert round(counts["accuracy"] * counts["responses"]) == right


def test_several_right_options_and_options_by_text(tmp_path):
    def several(line):
        line["target"] = "[0, 1]"
        line["acc"] = 1.0

    assert rows(changed(tmp_path, "truthfulqa_mc1", several))[0]["correct"] == [True, True, False]

    def by_text(line):
        line["target"] = "Yes, all do."
        line["acc"] = 1.0

    assert rows(changed(tmp_path, "truthfulqa_mc1", by_text))[0]["correct"] == [False, True, False]


def test_requests_without_context_are_for_mutual_information(tmp_path):
    def add(line):
        options = [request["arg_1"] for request in line["arguments"].values()]
        for i, text in enumerate(options, len(options)):
            line["arguments"][f"gen_args_{i}"] = {"arg_0": "", "arg_1": text}
            line["resps"].append([["-1.0", "False"]])

    assert rows(changed(tmp_path, "mmlu_anatomy", add)) == rows(SAMPLES / "samples_mmlu_anatomy.jsonl")


def test_arguments_may_be_lists_and_prompts_messages(tmp_path):
    messages = [{"role": "user", "content": "How many?"}]

    def older(line):
        line["arguments"] = [[[json.dumps(messages)], {"until": []}]]
        del line["metrics"]

    first = rows(changed(tmp_path, "gsm8k", older))[0]
    assert (first["prompt"], first["correct"]) == (messages, [True])


@pytest.mark.parametrize("change", [{"resps": [["7", "8"]]}, {"exact_match": 0.5}])
def test_what_no_metric_labels_is_left_to_a_matcher(tmp_path, change):
    found = rows(changed(tmp_path, "gsm8k", lambda line: line.update(change)))
    assert all("correct" not in row and row["answer"] for row in found)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("truthfulqa_mc2", {}, "the document 0 has the target '0', which does not tell the right ones"),
        ("mmlu_anatomy", {"target": "9"}, "has the target '9', which does not tell"),
        ("gsm8k", {"arguments": {}}, r"the document 0 lacks the expected form \(IndexError"),
        ("gsm8k", {"doc_id": 0}, "the document 0 occurs twice, with other responses"),
    ],
)
def test_documents_of_another_form_are_refused(tmp_path, name, change, message):
    with pytest.raises(DatasetError, match=message):
        rows(changed(tmp_path, name, lambda line: line.update(change)))


def test_options_in_the_prompts_are_refused(tmp_path):
    def vary(line):
        line["arguments"]["gen_args_0"]["arg_0"] = "Another"

    with pytest.raises(DatasetError, match="the document 0 has its options in the prompts"):
        rows(changed(tmp_path, "mmlu_anatomy", vary))
