"""Files of prompts, responses and annotations for `cme eval winrate`, and what can be wrong with them."""

import json

import pandas
import pytest

from cme.cli import main
from cme.errors import CMEError, DatasetError
from cme.evaluation.winrate import outcomes
from cme.evaluation.winrate.inputs import by_key, matched, read
from cme.evaluation.winrate.judges import Reply
from cme.evaluation.winrate.options import Options
from cme.evaluation.winrate.run import compare, recompute

ROWS = [{"id": i, "prompt": f"Q{i}?", "response": f"answer {i}"} for i in range(3)]


class FirstIsShorter:
    """A judge that prefers the shorter response: a real one, only not a language model."""

    name = "shorter"
    identity = {"kind": "test"}  # noqa: RUF012

    def ask(self, texts, record):
        for i, text in enumerate(texts):
            first, second = (text.split(f"<response_{n}>\n")[1].split("\n</response")[0] for n in (1, 2))
            verdict = "tie" if len(first) == len(second) else "1" if len(first) < len(second) else "2"
            record(i, Reply(answer=f"Verdict: {verdict}"))


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        if name.endswith(".csv"):
            pandas.DataFrame(rows).to_csv(path, index=False)
        elif name.endswith(".parquet"):
            pandas.DataFrame(rows).to_parquet(path)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(outcomes, "LC_RESAMPLES", 20)

    def run(a, b, **options):
        chosen = Options(a=str(a), b=str(b), output=tmp_path / "out", progress=False, **options)
        return compare(chosen, FirstIsShorter())

    return run


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_every_format_holds_the_same(write, name):
    entries = by_key(read(write(name, ROWS)), by_id=True)
    assert [(p.id, p.prompt) for p in matched([entries])] == [("0", "Q0?"), ("1", "Q1?"), ("2", "Q2?")]
    assert {key: entry.response for key, entry in entries.items()} == {str(i): f"answer {i}" for i in range(3)}


def test_alpaca_evals_prompts_and_outputs(write, run, tmp_path):
    prompts = [
        {"instruction": f"Q{i}?", "dataset": "helpful_base", "output": "r", "generator": "x"} for i in range(3)
    ]
    outputs = [{"instruction": f"Q{i}?", "output": f"{i}", "generator": "mine", "dataset": "d"} for i in (2, 1, 0)]
    longer = [{**row, "output": row["output"] * 5, "generator": "theirs"} for row in outputs]
    report = run(write("a.json", outputs), write("b.json", longer), prompts=write("eval.json", prompts))
    assert report.comparisons["mine vs theirs"]["wins"] == 3
    entries = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [e["instruction"] for e in entries] == ["Q0?", "Q1?", "Q2?"]
    assert entries[0] | {"id": None} == {
        "id": None,
        "dataset": "helpful_base",
        "instruction": "Q0?",
        "generator_1": "theirs",
        "output_1": "00000",
        "generator_2": "mine",
        "output_2": "0",
        "annotator": "shorter",
        "preference": 2.0,
        "verdict_model_shown_first": "first",
        "verdict_reference_shown_first": "second",
    }


def test_ids_match_whatever_the_order_and_texts_match_without_ids(write, run):
    shorter = [{**row, "response": "x"} for row in ROWS]
    assert run(write("a.jsonl", shorter[::-1]), write("b.jsonl", ROWS)).comparisons["a vs b"]["wins"] == 3
    without = [{"prompt": row["prompt"], "response": "x"} for row in ROWS[::-1]]
    assert run(write("c.jsonl", without), write("b.jsonl", ROWS)).comparisons["c vs b"]["wins"] == 3
    chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}], "response": "x"} for row in ROWS]
    assert run(write("d.jsonl", chat), write("b.jsonl", ROWS)).comparisons["d vs b"]["wins"] == 3


def test_a_prompt_that_is_missing_on_one_side(write, run, capsys):
    a, b = write("a.jsonl", ROWS), write("b.jsonl", ROWS[:1])
    with pytest.raises(
        DatasetError, match=r"b has no response to 2 of 3 prompts, the first is '1'.*--only-common"
    ):
        run(a, b)
    with pytest.raises(DatasetError, match=r"b has no response to 2 of 3 prompts, the first is '1'"):
        run(b, a)
    assert run(a, b, only_common=True).comparisons["a vs b"]["prompts"] == 1
    assert "2 of 3 prompts are left out" in capsys.readouterr().err
    other = write("c.jsonl", [{"id": 9, "prompt": "?", "response": "x"}])
    with pytest.raises(DatasetError, match="no prompt has a response from everybody"):
        run(a, other, only_common=True)


def test_duplicates(write, run):
    twice = write("twice.jsonl", [*ROWS, ROWS[1]])
    with pytest.raises(DatasetError, match=r"row 4 of .*twice.jsonl has the id '1' of row 2 of .*twice.jsonl"):
        run(twice, write("b.jsonl", ROWS))
    with pytest.raises(DatasetError, match=r"row 4 of .*twice.jsonl has the id '1'"):
        run(write("b.jsonl", ROWS), twice)
    unnamed = write("u.jsonl", [{"prompt": "Q?", "response": "x"}] * 2)
    with pytest.raises(DatasetError, match=r"has the prompt 'Q\?' of row 1 .*give the rows ids"):
        run(f"x={unnamed}", f"y={unnamed}")


def test_responses_whose_ids_are_those_of_prompts_need_no_prompts(write, run, capsys):
    prompts = write("p.jsonl", [{"id": row["id"], "prompt": row["prompt"]} for row in ROWS])
    longer, shorter = (
        [{"id": row["id"], "response": "x" * n} for row in [*ROWS, {"id": 9}]] for n in (5, 2)
    )  # a response more than there are prompts
    a, b = write("a.jsonl", shorter), write("b.jsonl", longer)
    numbers = run(a, b, prompts=prompts).comparisons["a vs b"]
    assert (numbers["wins"], numbers["prompts"]) == (3, 3)
    assert run(a, write("c.jsonl", ROWS), only_common=True).comparisons["a vs c"]["prompts"] == 3
    assert "1 of 4 ids are left out: no file has a prompt" in capsys.readouterr().err
    assert run(a, write("d.jsonl", [{**row, "prompt": None} for row in longer]), prompts=prompts)
    with pytest.raises(DatasetError, match=r"row 1 of .*a.jsonl has no prompt, .* id '0': name a file of prompts"):
        run(a, b)
    with pytest.raises(
        DatasetError, match=r"row 1 of .*a.jsonl has no prompt .*not every row of all files has an id"
    ):
        run(a, b, prompts=write("q.jsonl", [{"prompt": row["prompt"]} for row in ROWS]))


def test_one_id_for_two_prompts(write, run):
    other = [{**ROWS[0], "prompt": "Something else?"}, *ROWS[1:]]
    with pytest.raises(DatasetError, match=r"row 1 of .*b.jsonl has another prompt under the id '0'"):
        run(write("a.jsonl", ROWS), write("b.jsonl", other))


def test_empty_responses_are_judged_and_counted_and_missing_ones_refused(write, run):
    empty = [{**ROWS[0], "response": ""}, *ROWS[1:]]
    numbers = run(write("a.jsonl", empty), write("b.jsonl", ROWS)).comparisons["a vs b"]
    assert (numbers["empty_a"], numbers["empty_b"], numbers["prompts"], numbers["failed"]) == (1, 0, 3, 0)
    missing = [{**ROWS[0], "response": None}, *ROWS[1:]]
    with pytest.raises(DatasetError, match=r"row 1 of .*c.jsonl .*the response is missing"):
        run(write("c.jsonl", missing), write("b.jsonl", ROWS))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "Q?", "response": "x"}\n{"pro', r"line 2 of .*a.jsonl can't be read: not JSON"),
        (
            "a.jsonl",
            '{"prompt": "Q?", "response": ["x", "y"]}\n',
            "row 1 of .* has 2 responses, not one text",
        ),
        ("a.jsonl", '{"prompt": 3, "response": "x"}\n', "row 1 of .*a.jsonl .*the prompt is"),
        (
            "a.parquet",
            [{"prompt": "Q?", "response": ["x", "y"]}],
            "row 1 of .* has 2 responses, not one text: keep one",
        ),
        ("a.jsonl", '{"prompt": " ", "response": "x"}\n', "row 1 of .* has no prompt"),
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", '{"prompt": "Q?"}', "is not a JSON list of objects"),
        ("a.json", "[", "can't be read"),
    ],
)
def test_broken_files(tmp_path, write, run, name, content, message):
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        write(name, content)
    with pytest.raises(DatasetError, match=message):
        run(f"x={tmp_path / name}", f"y={tmp_path / name}")


def test_a_file_that_is_not_there(tmp_path, run):
    with pytest.raises(DatasetError, match=r"no.jsonl"):
        run(tmp_path / "no.jsonl", tmp_path / "no.jsonl")


def test_two_contestants_of_one_name_are_told_apart(write, run, tmp_path):
    (tmp_path / "new").mkdir()
    a, b = write("a.jsonl", ROWS), write("new/a.jsonl", ROWS)
    assert list(run(a, b).comparisons) == [f"{a} vs {b}"]
    assert list(run(f"after={a}", f"before={a}").comparisons) == ["after vs before"]
    with pytest.raises(CMEError, match="two contestants are called"):
        run(a, a)


@pytest.mark.parametrize("missing", [{}, {"instruction": 3}, {"instruction": None}])
def test_annotations_need_no_prompts_and_nan_is_a_failure(write, missing):
    rows = [{**missing, "preference": value} for value in (2, float("nan"))]
    for name in ("annotations.json", "annotations.parquet"):
        numbers = recompute(write(name, rows), None).comparisons["A vs B"]
        assert (numbers["wins"], numbers["failed"]) == (1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"preference": 1}', "is not a JSON list of objects"),
        ("[1]", "is not a JSON list of objects"),
        ("[", "can't be read"),
        ("[]", "is empty"),
        ("[" * 100_000, "nested"),
        (None, "there is no file"),
    ],
)
def test_broken_annotations(tmp_path, content, message):
    if content is not None:
        (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        recompute(tmp_path / "annotations.json", None)


def test_a_line_of_annotations_that_cannot_be_read(tmp_path):
    (tmp_path / "annotations.jsonl").write_text('{"preference": 1}\n{"pref\n')
    with pytest.raises(DatasetError, match=r"line 2 of .*annotations.jsonl can't be read: not JSON"):
        recompute(tmp_path / "annotations.jsonl", None)


def test_a_limit_takes_the_first(write, run):
    assert run(write("a.jsonl", ROWS), write("b.jsonl", ROWS[::-1]), limit=2).comparisons["a vs b"]["prompts"] == 2


def annotation(preference, a="xx", b="y"):
    return {
        "instruction": "Q?",
        "output_1": b,
        "generator_1": "reference",
        "output_2": a,
        "generator_2": "model",
        "annotator": "gpt",
        "preference": preference,
    }


def test_published_annotations_are_recomputed(write, tmp_path, capsys):
    path = write("annotations.json", [annotation(p) for p in (1, 2, 2.0, 1.5, 0, 1.25, None, None)])
    assert main(["eval", "winrate", "--annotations", str(path), "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "A: model, B: reference" in told
    numbers = json.loads((tmp_path / "out" / "winrate.json").read_text())["comparisons"]["model vs reference"]
    assert numbers["win_rate"] == pytest.approx((0 + 1 + 1 + 0.5 + 0.5 + 0.25) / 6)
    assert (numbers["wins"], numbers["ties"], numbers["losses"], numbers["failed"]) == (2, 2, 2, 2)
    assert numbers["win_rate_failures_as_ties"] == pytest.approx((3.25 + 1) / 8)
    shown = {tuple(line.strip().split("  ", 1)) for line in told.splitlines()}
    rows = {label: value.strip() for label, value in (pair for pair in shown if len(pair) == 2)}
    assert rows["failed, left out"] == "2 of 8 prompts"
    assert rows["win rate, failures as ties"] == "53.1 %"
    assert (numbers["mean_length_a"], numbers["mean_length_b"]) == (2, 1)


def test_written_annotations_are_read_back(write, run, tmp_path):
    report = run(
        write("a.jsonl", [{**row, "response": "x" * (8 + i)} for i, row in enumerate(ROWS)]),
        write("b.jsonl", ROWS),
    )
    again = recompute(tmp_path / "out" / "annotations.json", None)
    assert again.comparisons == report.comparisons


@pytest.mark.parametrize("preference", [3, 0.5, "2", True, -1])
def test_preferences_that_mean_nothing(write, preference):
    with pytest.raises(DatasetError, match=r"row 2 of .* has the preference"):
        recompute(write("annotations.json", [annotation(1), annotation(preference)]), None)


def test_outputs_are_not_annotations(write):
    with pytest.raises(DatasetError, match="has no preference: is it a file of annotations, not of outputs"):
        recompute(write("outputs.json", [{"instruction": "Q?", "output": "x", "generator": "m"}]), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "b.jsonl", "-o", "x"], "name a judge"),
        (["a.jsonl", "-o", "x"], "give two models"),
        (["a.jsonl", "b.jsonl", "--judge", "local:m"], "-o FOLDER"),
        (["a.jsonl", "b.jsonl", "-o", "x", "--judge", "gpt-5"], "neither an http"),
        (["a.jsonl", "b.jsonl", "-o", "x", "--judge", "http://x/v1"], "--judge-model"),
        (["a.jsonl", "b.jsonl", "--annotations", "x.json"], "give no models"),
    ],
)
def test_a_command_line_that_makes_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "winrate", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_judge_prompt_can_be_had_to_be_changed(capsys):
    assert main(["eval", "winrate", "--print-judge-prompt"]) == 0
    assert "{first}" in capsys.readouterr().out
