"""`cme eval correctness`: what it reads, computes, writes, and refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from transformers import AutoTokenizer

import cme.evaluation.correctness.run as run_module
import cme.evaluation.generate as generate_module
from cme.cli import main
from cme.errors import DatasetError
from cme.evaluation.correctness import report
from cme.evaluation.correctness.data import load_data, options_named
from cme.evaluation.correctness.metrics import auroc, best_of_n, pair_accuracy
from cme.evaluation.correctness.options import Options
from cme.evaluation.correctness.run import scorers
from cme.evaluation.correctness.signals import Response, Signal
from cme.evaluation.correctness.signals import evaluate as evaluate_signals
from cme.evaluation.generate import rendered
from cme.options import Parser, parse
from cme.scores import SIGNAL_STATS
from cme.tasks.matchers import Task
from cme.tasks.questions import Question
from cme.tasks.registry import TASKS
from cme.text.rendering import Renderer, encode_prompt
from cme.verifier import Verifier

ROWS = [
    {"prompt": "Capital of France?", "response": "The capital is Paris.", "correct": True},
    {"prompt": "Capital of France?", "response": "Lyon", "correct": False},
    {"prompt": "Capital of France?", "response": "It is Nice", "correct": False},
    {"prompt": "Capital of Peru?", "response": "Lima", "correct": True},
    {"prompt": "Capital of Peru?", "response": "The answer is Lima!", "correct": True},
    {"prompt": "Capital of Peru?", "response": "What?", "correct": False},
    {"prompt": "Capital of Italy?", "response": "Milan", "correct": False},
    {"prompt": "Capital of Italy?", "response": "Rome.", "correct": True},
    {"prompt": "Capital of Spain?", "response": "Madrid", "correct": True},
]


@pytest.fixture
def evaluate(tmp_path, tiny_models):
    """Run the command on rows or on a name; returns what is in correctness.json."""

    def run(data, *options, code=0, output="out", verifier=tiny_models["verifier"]):
        if not isinstance(data, str):
            path = tmp_path / "in.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in data))
            data = str(path)
        arguments = ["eval", "correctness", data, "--verifier", verifier, "-o", str(tmp_path / output)]
        assert main([*arguments, "--no-progress", "--resamples", "50", *options]) == code
        return read(tmp_path / output) if code in (0, 3) else None

    return run


@pytest.fixture(scope="module")
def verifier(tiny_models):
    return Verifier.from_pretrained(tiny_models["verifier"])


@pytest.fixture
def toys(monkeypatch):
    """A task called `toys`."""
    numbers = [Question(str(i), f"What is {i}?", (str(i),), "Say it.") for i in range(5)]
    numeric = TASKS["arithmetic"].matcher
    monkeypatch.setitem(TASKS, "toys", Task("toys", "numbers", lambda split: numbers, numeric))


def read(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "correctness.json").read_text(), parse_constant=refuse)


def responses(folder):
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def arrays(rows):
    questions = list(dict.fromkeys(row["prompt"] for row in rows))
    return np.array([r["correct"] for r in rows]), np.array([questions.index(r["prompt"]) for r in rows])


def test_every_signal_is_that_of_the_verifier_with_higher_meaning_likelier_right(
    evaluate, verifier, tmp_path, capsys
):
    result = evaluate(ROWS)
    correct, question = arrays(ROWS)
    scores = verifier.score([r["prompt"] for r in ROWS], [r["response"] for r in ROWS], stats=SIGNAL_STATS)
    better = {"mean_logprob": 1, "sum_logprob": 1, "top1_rate": 1}
    for name in ("mean_logprob", "sum_logprob", "mean_entropy", "bits_per_byte", "top1_rate"):
        values = np.array([better.get(name, -1) * getattr(score, name) for score in scores])
        found = result["signals"][f"verifier/{name}"]
        assert found["auroc"] == pytest.approx(auroc(values, correct)[0]), name
        assert found["pair_accuracy"] == pytest.approx(pair_accuracy(values, correct, question).mean()), name
        assert found["best_of_n"] == pytest.approx(best_of_n(values, correct, question).mean()), name
    length = -np.array([score.num_tokens for score in scores])
    assert result["signals"]["length/tokens"]["auroc"] == pytest.approx(auroc(length, correct)[0])
    assert result["counts"] == {
        "questions": 4,
        "responses": 9,
        "right": 5,
        "accuracy": 5 / 9,
        "questions_with_right": 4,
        "questions_with_wrong": 3,
        "questions_with_right_and_wrong": 3,
        "questions_with_one_response": 1,
    }
    assert result["baselines"]["mean_accuracy"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    assert result["baselines"]["oracle_accuracy"] == 1
    assert not any("answer" in name or "generator" in name for name in result["signals"])
    told = capsys.readouterr().out
    assert "9 responses to 4 questions, 55.6% right" in told
    assert f"verifier/mean_logprob: AUROC {result['signals']['verifier/mean_logprob']['auroc']:.3f}" in told
    assert "AUROC above length/tokens" in told
    assert told.count("undecided: 3 questions are too few") == 2 + 4  # AUROC, pairs, and four controls
    assert "intervals are not to be trusted: only 3 questions have a wrong response" in told
    markdown = (tmp_path / "out" / "correctness.md").read_text()
    assert all(f"| {name} |" in markdown for name in result["signals"])
    assert (tmp_path / "out" / "correctness.png").read_bytes()[:4] == b"\x89PNG"
    written = responses(tmp_path / "out")
    assert [row["text"] for row in written] == [row["response"] for row in ROWS]
    assert written[0]["verifier/bits_per_byte"] == pytest.approx(scores[0].bits_per_byte, rel=1e-4)


def test_differences_to_controls_are_paired(evaluate):
    signals = evaluate(ROWS)["signals"]
    headline = signals["verifier/mean_logprob"]
    assert headline["auroc_below"] is None
    length = signals["length/tokens"]
    assert length["auroc_below"]["difference"] == pytest.approx(headline["auroc"] - length["auroc"])


def test_a_function_of_the_likelihood_differs_from_it_in_no_sample():
    items = [Response(str(i // 3), "p", "p", "t", i % 2 == 0, None, "t") for i in range(30)]
    values = np.random.default_rng(0).normal(size=30)
    signals = [Signal("verifier/mean_logprob", False, 1, values), Signal("other/same", True, -1, np.exp(values))]
    same = evaluate_signals(items, signals, resamples=50, seed=0)["signals"]["other/same"]
    below = {"reference": "verifier/mean_logprob", "difference": 0, "interval": (0, 0)}
    assert same["auroc_below"] == below


def test_the_random_verifier_has_the_architecture_and_none_of_the_weights(tiny_models, verifier, evaluate):
    models = scorers(Options("x", Path("x"), tiny_models["verifier"], random_verifiers=2))
    own = models["verifier"].load()
    first, again, other = (models[name].load() for name in ("random-0", "random-0", "random-1"))
    state = own.model.state_dict()
    assert {n: t.shape for n, t in first.model.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert all(t.equal(again.model.state_dict()[n]) for n, t in first.model.state_dict().items())
    for name, tensor in first.model.state_dict().items():
        if tensor.ndim > 1:
            assert not tensor.equal(state[name]), name
            assert not tensor.equal(other.model.state_dict()[name]), name
    assert all(t.equal(verifier.model.state_dict()[n]) for n, t in state.items())
    assert first.renderer.template == own.renderer.template
    assert first.model.config is not own.model.config  # which its making changes
    signals = evaluate(ROWS, "--random-verifiers", "2")["signals"]
    assert {"random-0/mean_logprob", "random-1/mean_entropy"} <= set(signals)
    assert not any(
        "random" in name for name in evaluate(ROWS, "--random-verifiers", "0", output="none")["signals"]
    )


def test_answers_are_scored_alone_where_they_are_found(evaluate, verifier, tmp_path):
    rows = [{**row, "span": row["response"].split()[-1].strip(".!?")} for row in ROWS]
    rows[1]["span"] = "nowhere"  # then the whole response is the answer
    rows[2]["span"] = [90, 99]
    result = evaluate(rows, "--span-column", "span")
    assert result["answers_found"] == pytest.approx(8 / 9)
    for row, found in zip(rows, responses(tmp_path / "out"), strict=True):
        score = verifier.score([row["prompt"]], [row["response"]], stats=SIGNAL_STATS, token_spans=True)[0]
        start = row["response"].rfind(str(row["span"]))
        part = score if start < 0 else score.within(start, start + len(row["span"]))
        for name in ("mean_logprob", "mean_entropy", "num_tokens"):
            wanted = pytest.approx(getattr(part, name), rel=1e-4, abs=1e-4)
            assert found[f"verifier/answer_{name}"] == wanted, name
    values = np.array([row["verifier/answer_mean_logprob"] for row in responses(tmp_path / "out")])
    assert result["signals"]["verifier/answer_mean_logprob"]["auroc"] == pytest.approx(
        auroc(values, arrays(rows)[0])[0]
    )
    random = result["signals"]["random-0/answer_mean_entropy"]
    assert random["auroc_below"]["reference"] == "verifier/answer_mean_logprob"  # like with like


def test_gold_answers_are_matched_and_votes_counted_by_answer(evaluate):
    rows = [
        {"question": "1 + 1?", "responses": ["2", "It is 2.0.", "3", "2"], "answer": 2},
        {"question": "2 + 2?", "responses": ["5", "5!", "4"], "answer": "4"},
    ]
    result = evaluate(rows, "--matcher", "numeric")
    assert (result["counts"]["right"], result["counts"]["responses"]) == (4, 7)
    vote = result["signals"]["self-consistency/vote"]
    assert vote["best_of_n"] == 0.5  # the majority says 2, which is right, and 5, which is wrong
    assert vote["auroc"] == pytest.approx((3 * 3 + 1) / 12)  # right: 3/4 thrice, 1/3; wrong: 1/4, 2/3 twice


@pytest.mark.parametrize(
    ("matcher", "gold", "why"),
    [
        ("numeric", "abc", "the question 'b' has the answer 'abc', which is no number; mend it, or take another"),
        ("numeric", "She sold 72 clips.", "which is no number"),
        ("numeric", "1,2", "has the answer '1,2', which is no number"),
        ("numeric", ["1", "two"], "has the answer 'two', which is no number"),
        ("numeric", None, "the column 'answer' holds no answer"),
        ("numeric", [], "the column 'answer' holds no answer"),
        ("numeric", ["1", None], "the column 'answer' holds no answer"),
        ("numeric", True, "the answer True is neither a text nor a number"),
        ("exact", False, "the answer False is neither a text nor a number"),
        ("exact", [["x"]], "the answer ['x'] is neither a text nor a number"),
        ("exact", {"value": "x"}, "the answer {'value': 'x'} is neither a text nor a number"),
        ("contains", "?", "has the answer '?', in which there is no word"),
        ("choice", "E", "the answer 'E' names none of the options x, y"),
        ("choice", 2, "the answer 2 names none of the options x, y"),
        ("choice", 0.5, "the answer 0.5 names none of the options x, y"),
    ],
)
def test_a_right_answer_that_cannot_be_read_is_an_error_with_its_row(tmp_path, matcher, gold, why):
    choices = {"choices": ["x", "y"]} if matcher == "choice" else {}
    golds = {"a": "x" if choices else "#### 1", "b": gold}
    rows = [{"prompt": prompt, "response": "1", "answer": gold, **choices} for prompt, gold in golds.items()]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DatasetError, match=rf"in\.jsonl, row 2: .*{re.escape(why)}"):
        load_data(Options(str(path), tmp_path, "no/model", matcher=matcher))


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        (float("nan"), "the answer nan is neither a text nor a number"),
        (float("inf"), "has the answer 'inf', which is no number"),
    ],
)
def test_a_number_of_parquet_that_is_no_right_answer_is_an_error_with_its_row(tmp_path, gold, why):
    path = tmp_path / "in.parquet"
    table = pyarrow.table({"prompt": ["a", "b"], "response": ["1", "1"], "answer": [1.0, gold]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DatasetError, match=rf"in\.parquet, row 2: .*{re.escape(why)}"):
        load_data(Options(str(path), tmp_path, "no/model", matcher="numeric"))


def test_right_answers_are_read_as_they_are_written(tmp_path):
    golds = [72, 72.0, "72", "$72", "She sold 48/2 = 24 more.\n#### 72", ["71", 72]]
    rows = [{"prompt": str(i), "response": "The answer is 72.", "answer": gold} for i, gold in enumerate(golds)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(Options(str(path), tmp_path, "no/model", matcher="numeric"))
    assert [response.correct for response in data.responses] == [True] * len(golds)
    pandas.DataFrame({"prompt": ["a", "b"], "response": ["7", "8"], "answer": [7.0, 8.0]}).to_parquet(
        tmp_path / "in.parquet"
    )
    data = load_data(Options(str(tmp_path / "in.parquet"), tmp_path, "no/model", matcher="exact"))
    assert [response.correct for response in data.responses] == [True, True]


@pytest.mark.parametrize(
    ("first", "labels", "problems"),
    [
        ([], [], []),
        (None, [], ["the response is missing"]),
        (None, None, ["the response is missing"]),
        ([{"role": "assistant", "content": "a"}], [True], [None]),
    ],
)
def test_a_first_row_that_does_not_show_it_leaves_later_rows_lists_of_responses(tmp_path, first, labels, problems):
    rows = [
        {"prompt": "a", "responses": first, "correct": labels},
        {"prompt": "b", "responses": ["x", "y"], "correct": [True, False]},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_data(Options(str(path), tmp_path, "no/model")).responses
    assert [(r.text, r.correct) for r in found if r.question == "1"] == [("x", True), ("y", False)]
    assert [r.problem for r in found if r.question == "0"] == problems


def test_a_file_without_responses_is_refused(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "responses": [], "correct": []}\n')
    with pytest.raises(DatasetError, match="has no responses"):
        load_data(Options(str(path), tmp_path, "no/model"))


def test_votes_and_answers_are_those_after_the_thoughts(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["<think>1</think>It is 2.", "1?\n</think>\n2", "<think>2"], "answer": 2},
        {"prompt": "b", "responses": ["<think>x</think>No", "<think>y</think> no", "<think>"], "answer": 2},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_data(Options(str(path), tmp_path, "no/model", matcher="numeric")).responses
    assert [r.correct for r in found] == [True, True, False, False, False, False]
    assert [r.answer for r in found] == ["2", "2", "<think>2", "no", "no", "<think>"]
    assert [r.span and r.text[slice(*r.span)] for r in found[:3]] == ["2", "2", None]


def test_files_of_every_format_say_the_same(evaluate, tmp_path):
    rows = [
        {"prompt": "Pick", "responses": ["a", "b."], "answer": "b", "choices": ["x", "b"]},
        {"prompt": "Take", "responses": ["A", "B"], "answer": "0", "choices": ["x", "y"]},
    ]
    wanted = evaluate(rows, "--matcher", "choice")
    assert wanted["counts"]["right"] == 2
    frame = pandas.DataFrame(rows)
    frame.to_parquet(tmp_path / "in.parquet")
    for column in ("responses", "choices"):
        frame[column] = frame[column].map(json.dumps)
    frame.to_csv(tmp_path / "in.csv", index=False)
    for suffix in ("parquet", "csv"):
        found = evaluate(str(tmp_path / f"in.{suffix}"), "--matcher", "choice", output=suffix)
        assert found["signals"] == wanted["signals"], suffix


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind_leave_auroc_undefined(evaluate, capsys, tmp_path, label):
    result = evaluate([{**row, "correct": label} for row in ROWS], code=3)
    word = "right" if label else "wrong"
    said = f"AUROC, pair accuracy and calibration are undefined: all 9 responses are {word}"
    assert said in result["undefined"]
    for signal in result["signals"].values():
        assert (
            signal["auroc"] is signal["auroc_interval"] is signal["pair_accuracy"] is signal["calibration"] is None
        )
        assert signal["best_of_n"] == label
    told = capsys.readouterr().out
    assert said in told
    assert "verifier/mean_logprob: no verdict, AUROC is undefined" in told
    assert (tmp_path / "out" / "correctness.png").exists()


def test_questions_with_one_response_are_counted(evaluate):
    single = [row for i, row in enumerate(ROWS) if i in (0, 5, 6, 8)]
    result = evaluate(single)
    assert "best of N is undefined: no question has more than one response" in result["undefined"]
    assert "pair accuracy is undefined: no question has both right and wrong responses" in result["undefined"]
    headline = result["signals"]["verifier/mean_logprob"]
    assert headline["best_of_n"] is headline["pair_accuracy"] is result["baselines"]["oracle_accuracy"] is None
    assert headline["auroc"] is not None
    assert "self-consistency/vote" not in result["signals"]
    some = evaluate(ROWS, output="some")
    assert "best of N leaves out 1 questions with one response" in some["undefined"]


def test_resamples_that_leave_an_interval_undefined_are_no_crash(evaluate, capsys, tmp_path):
    result = evaluate([ROWS[0], ROWS[6]], "--resamples", "1")  # the resample has one question twice
    headline = result["signals"]["verifier/mean_logprob"]
    assert headline["auroc"] is not None
    assert headline["auroc_interval"] is None
    assert "undecided: 1 questions are too few" in capsys.readouterr().out
    assert (tmp_path / "out" / "correctness.png").exists()


def test_what_one_model_cannot_score_is_left_out_for_all(evaluate, capsys, tmp_path):
    long = {"prompt": "Capital of Peru?", "response": "z" * 300, "correct": False}
    empty = {"prompt": "Capital of Peru?", "response": "", "correct": True}
    missing = {"prompt": "Capital of Peru?", "response": None, "correct": True}
    result = evaluate([ROWS[0], long, *ROWS[1:], empty, missing])
    wanted = evaluate(ROWS, output="without")
    assert result["signals"] == wanted["signals"]
    assert result["counts"] == wanted["counts"]
    reasons = result["left_out"]
    assert reasons.pop("the response is empty") == 1
    assert reasons.pop("the response is missing") == 1
    assert len(reasons) == 1
    assert "tokens exceed the verifier's context of 256" in next(iter(reasons))
    assert "left out for every signal: 1 responses, the response is empty" in capsys.readouterr().out
    assert len(responses(tmp_path / "out")) == 12
    evaluate([empty, long], code=1, output="nothing")
    assert "error: none of the 2 responses could be scored: the response is empty (1)" in capsys.readouterr().err


def test_malformed_lines_are_counted(evaluate, tmp_path, capsys):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "bad.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    result = evaluate(str(tmp_path / "bad.jsonl"), code=3)
    assert result["malformed"] == 1
    assert result["counts"]["responses"] == 9
    assert "left out: 1 malformed lines of the file" in capsys.readouterr().out


def test_a_row_with_an_empty_list_of_responses_has_none(evaluate):
    rows = [{"prompt": "Capital of Chad?", "responses": [], "correct": []}]
    rows += [{"prompt": r["prompt"], "responses": [r["response"]], "correct": [r["correct"]]} for r in ROWS]
    assert evaluate(rows)["counts"]["responses"] == len(ROWS)


def test_bad_input_is_explained(evaluate, capsys, toys):
    first, second = ROWS[0], ROWS[3]

    def error(data, *options):
        evaluate(data, *options, code=1)
        return capsys.readouterr().err

    assert "no task 'capitols': give capitals, civics" in error("capitols")
    assert "there is no file 'here/none.jsonl'" in error("here/none.jsonl")
    assert "row 2: the id '7' came before, with another prompt" in error([{**first, "id": 7}, {**second, "id": 7}])
    twice = {"id": 7, "prompt": "Hi", "responses": ["a"], "correct": [True]}
    assert "row 2: the id '7' came before: ids must be unique" in error([twice, twice])
    assert "no column 'prompt', 'question' or 'instruction'; it has response" in error([{"response": "a"}])
    assert "no column 'correct' (true or false) and none with gold answers" in error(
        [{"prompt": "a", "response": "b"}]
    )
    assert "no column 'response', 'responses'" in error([{"prompt": "a", "correct": True}])
    assert "no column 'right'; it has prompt, response, correct" in error([first], "--correct-column", "right")
    assert "name their column with --response-column, or the model that answers with --generator" in error(
        [{"prompt": "a", "answer": "b"}], "--matcher", "exact"
    )
    gold = {"prompt": "a", "response": "b", "answer": "b"}
    assert "say what counts as right with --matcher, one of exact, contains, numeric, math, choice" in error(
        [gold]
    )
    assert "no matcher 'fuzzy': give exact" in error([gold], "--matcher", "fuzzy")
    assert "row 1: the question 'a' has no options" in error([gold], "--matcher", "choice")
    assert "row 2: the question 'a' came before with another" in error(
        [gold, {**gold, "answer": "c"}], "--matcher=exact"
    )
    assert "row 1: the column 'answer' holds no answer" in error([{**gold, "answer": " "}], "--matcher", "exact")
    options = {**gold, "choices": ["x", "y"]}
    assert "row 1: the answer 'b' names none of the options x, y" in error([options], "--matcher", "choice")
    assert "row 1: the answer 'A' may mean A or B of the options B, A" in error(
        [{**options, "choices": ["B", "A"], "answer": "A"}], "--matcher", "choice"
    )
    assert "row 1: the column 'correct' holds 'maybe'" in error([{**first, "correct": "maybe"}])
    assert "row 1: the column 'correct' holds '[[[" in error([{**first, "correct": "[" * 100_000}])
    assert "row 1: the prompt is neither a text nor a list of messages but int" in error([{**first, "prompt": 7}])
    assert "row 1: the prompt is empty" in error([{**first, "prompt": ""}])
    assert "row 1: 2 labels for 1 responses" in error([{**first, "correct": [True, False]}])
    assert "the task 'toys' has questions alone: name the model that answers with --generator" in error("toys")
    assert "--matcher is for files" in error("toys", "--matcher", "exact")
    assert "--temperature 0 gives equal responses" in error("toys", "--temperature", "0")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--samples", "0", "'0' is not a whole number at least 1"),
        ("--limit", "-2", "'-2' is not a whole number at least 1"),
        ("--resamples", "0", "'0' is not a whole number at least 1"),
        ("--top-p", "0", "'0' is not a number above 0, at most 1"),
        ("--temperature", "nan", "'nan' is not a number at least 0"),
    ],
)
def test_values_that_make_no_sense_are_told_from_the_start(option, value, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "correctness", "toys", "--verifier", "v", "-o", "x", f"{option}={value}"])
    assert stopped.value.code == 2
    assert f"argument {option}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "choices", "options"),
    [
        (2, "1248", {"4"}),  # as MMLU has it
        (1, "xy", {"y"}),
        (4, "1248", set()),
        ("2", "1248", {"2", "4"}),
        ("4", "1248", {"4"}),
        ("0", "1248", {"1"}),
        ("1", "21", {"1"}),  # by its text and by its index
        ("B", "xy", {"y"}),
        ("B", "AB", {"B"}),
        ("²", "xyz", set()),
        (True, ["False", "True"], {"True"}),
    ],
)
def test_a_number_is_an_index_and_a_text_may_be_one(answer, choices, options):
    assert options_named(answer, tuple(choices)) == options


def test_ids_may_name_the_question_of_several_rows(evaluate):
    ids = {
        "Capital of France?": "fr",
        "Capital of Peru?": "pe",
        "Capital of Italy?": "it",
        "Capital of Spain?": "es",
    }
    result = evaluate([{"id": ids[row["prompt"]], **row} for row in ROWS])
    assert result["counts"]["questions"] == 4


def test_a_generator_answers_a_task_and_is_a_control(evaluate, toys, tiny_models, tmp_path, capsys):
    options = ("--generator", tiny_models["generator"], "--samples", "3", "--max-new-tokens", "6")
    result = evaluate("toys", *options, "--limit", "4", code=3)
    assert (result["counts"]["questions"], result["counts"]["responses"]) == (4, 12)
    generator = Verifier.from_pretrained(tiny_models["generator"])
    for row in responses(tmp_path / "out"):
        assert row["prompt"] == f"What is {row['question']}?"
        asked = [{"role": "user", "content": f"Say it. What is {row['question']}?"}]
        assert row["asked"] == asked
        score = generator.score([asked], [row["text"]], stats=("entropy",))[0]
        assert row["generator/mean_logprob"] == pytest.approx(score.mean_logprob, rel=1e-4)
        assert row["generator/mean_entropy"] == pytest.approx(score.mean_entropy, rel=1e-4)
    assert {"generator/mean_logprob", "generator/mean_entropy"} <= set(result["signals"])
    other = evaluate("toys", *options, "--limit", "4", "--seed", "2", code=3, output="other")
    texts = [[row["text"] for row in responses(tmp_path / folder)] for folder in ("out", "other")]
    assert texts[0] != texts[1]
    assert other["settings"]["seed"] == 2


@pytest.mark.parametrize("name", ["generator", "verifier"])  # with a chat template, and without
def test_a_generator_is_scored_given_what_it_was_asked(tiny_models, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[name])
    question = Question("1", "Which?", ("b",), "Letter:", ("a", "b"))
    asked, _ = rendered([question.prompt], tokenizer, "auto")
    assert tuple(encode_prompt(tokenizer, asked[0])) == Renderer.of(tokenizer).prompt_ids(question.prompt)


def test_line_breaks_of_a_template_are_written_as_escapes(capsys):
    template = [r"--template=Q: {prompt}\nA: {response}", "--verifier-chat-template-kwargs", '{"brief": true}']
    options = parse(Parser(), Options, ["x", "-o", "out", "--verifier", "v", *template])
    assert options.template == "Q: {prompt}\nA: {response}"
    assert options.verifier_chat_template_kwargs == {"brief": True}
    with pytest.raises(SystemExit):
        parse(Parser(), Options, ["x", "-o", "out", "--verifier", "v", "--chat-template-kwargs", "{a}"])
    assert "the value '{a}' is not JSON" in capsys.readouterr().err


def test_splits_of_a_task():
    held_out, train, both, few = (
        load_data(Options("capitals", Path("x"), "v", "g", split=split, limit=count)).questions
        for split, count in (("held_out", None), ("train", None), ("all", None), ("all", 81))
    )
    assert both == [*held_out, *train]
    assert len({q.id for q in both}) == len(both) == 227
    assert few == both[:81]


def test_questions_of_a_file_are_answered_too(evaluate, tiny_models):
    rows = [{"question": f"What is {i}?", "answer": i} for i in (0, 1, 1, 2)]
    options = ("--generator", tiny_models["generator"], "--samples", "2", "--max-new-tokens", "4")
    result = evaluate(rows, "--matcher", "numeric", *options, code=3)
    assert (result["counts"]["questions"], result["counts"]["responses"]) == (3, 6)


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(run_module, "CHUNK", 4)


def test_an_interrupted_run_resumes_where_it_stopped(
    evaluate, toys, tiny_models, tmp_path, monkeypatch, small_steps, capsys
):
    options = ("--generator", tiny_models["generator"], "--samples", "2", "--max-new-tokens", "4")
    options += ("--batch-size", "4")
    wanted = evaluate("toys", *options, code=3, output="whole")
    sampled, scored = [], []
    generate, score = generate_module.generate, Verifier.score

    def stop_at(calls, call, limit):
        def run(*arguments, **keywords):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(1)
            return call(*arguments, **keywords)

        return run

    with monkeypatch.context() as patched:
        patched.setattr(generate_module, "generate", stop_at(sampled, generate, 2))
        evaluate("toys", *options, code=130)
    assert "resumes where this one stopped" in capsys.readouterr().err
    assert not (tmp_path / "out" / "correctness.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(generate_module, "generate", stop_at(sampled, generate, 9))
        patched.setattr(Verifier, "score", stop_at(scored, score, 4))  # in the middle of the second model
        evaluate("toys", *options, code=130)
    assert len(sampled) == 3  # three batches of at most four make the ten responses
    with monkeypatch.context() as patched:
        patched.setattr(generate_module, "generate", stop_at(sampled, generate, 0))
        patched.setattr(Verifier, "score", stop_at(scored, score, 99))
        found = evaluate("toys", *options, code=3)
    assert len(scored) == 9  # three models
    assert found == wanted
    assert responses(tmp_path / "out") == responses(tmp_path / "whole")


def test_a_torn_line_of_the_journal_is_done_again(evaluate, tmp_path):
    wanted = evaluate(ROWS)
    journal = tmp_path / "out" / "journal" / "verifier.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert evaluate(ROWS) == wanted


def test_a_finished_run_needs_no_model(evaluate, tmp_path, monkeypatch):
    wanted = evaluate(ROWS)
    monkeypatch.setattr(Verifier, "from_pretrained", None)
    assert evaluate(ROWS) == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: 5,
        lambda rows: None,
        lambda rows: ["x"],
        lambda rows: [None],
        lambda rows: [{name: value for name, value in row.items() if name != "unscorable"} for row in rows],
        lambda rows: [{**row, "num_tokens": "3"} for row in rows],
        lambda rows: [*rows, rows[0]],
    ],
    ids=["number for a list", "null for a list", "text", "null", "missing key", "text for a number", "too many"],
)
def test_rows_of_a_journal_of_another_form_are_damaged(evaluate, tmp_path, capsys, change):
    evaluate(ROWS)
    journal = tmp_path / "out" / "journal" / "verifier.jsonl"
    header, line = journal.read_text().splitlines()
    journal.write_text(header + "\n" + json.dumps(change(json.loads(line))) + "\n")
    evaluate(ROWS, code=1)
    assert "verifier.jsonl is damaged: delete it to start anew" in capsys.readouterr().err


def test_scores_of_the_generator_by_earlier_versions_do_not_name_its_template(
    evaluate, toys, tiny_models, tmp_path
):
    options = ("--generator", tiny_models["generator"], "--max-new-tokens", "4", "--samples", "2")
    wanted = evaluate("toys", *options, code=3)
    journal = tmp_path / "out" / "journal" / "generator.jsonl"
    header, *lines = journal.read_text().splitlines()
    old = {name: value for name, value in json.loads(header).items() if name != "template"}
    for template in ({}, {"template": "auto"}):
        journal.write_text("\n".join([json.dumps({**old, **template}), *lines]) + "\n")
        assert evaluate("toys", *options, code=3) == wanted


def test_other_settings_do_not_resume_the_same_run(evaluate, toys, tiny_models, capsys):
    options = ("--generator", tiny_models["generator"], "--max-new-tokens", "4")
    evaluate("toys", *options, "--samples", "2", code=3)
    evaluate("toys", *options, "--samples", "3", code=1)
    told = capsys.readouterr().err
    assert "is of a run with samples = 2, not 3. Continue with what it was started with, or forget it" in told
    evaluate("toys", *options, "--samples", "2", "--template", "{prompt} {response}", code=1)
    assert "with template = 'auto', not '{prompt} {response}'" in capsys.readouterr().err
    assert evaluate("toys", *options, "--samples", "3", "--overwrite", code=3)["counts"]["responses"] == 15
    evaluate(ROWS, output="file")
    evaluate(ROWS, "--seed", "1", code=1, output="file")
    assert "random-0.jsonl is of a run with seed = 0, not 1" in capsys.readouterr().err
    evaluate(ROWS[:8], code=1, output="file")
    assert "an input with other contents" in capsys.readouterr().err


def test_other_weights_under_the_same_name_do_not_resume_a_finished_run(evaluate, toys, tmp_path, capsys):
    model = tmp_path / "model"
    tiny.llama(0).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    evaluate(ROWS, verifier=str(model))
    options = ("--generator", str(model), "--samples", "2", "--max-new-tokens", "4")
    evaluate("toys", *options, code=3, output="sampled")
    tiny.llama(1).save_pretrained(model)
    capsys.readouterr()
    evaluate(ROWS, verifier=str(model), code=1)
    assert "verifier.jsonl is of a run of a verifier with other files" in capsys.readouterr().err
    evaluate("toys", *options, code=1, output="sampled")
    assert "responses.jsonl is of a run of a model with other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(3, "better"), (0, "NOT shown to be better"), (-3, "WORSE")],
    ids=["above", "chance", "below"],
)
def test_the_verdict_is_that_of_the_intervals(shift, verdict):
    rng = np.random.default_rng(0)
    labels = [i % 2 == 0 for i in range(80)]
    items = [Response(str(i // 4), "p", "p", "t", label, None, "t") for i, label in enumerate(labels)]
    noise, other = rng.normal(size=80), rng.normal(size=80)
    values = noise + shift * np.array(labels)
    signals = [Signal("verifier/mean_logprob", False, 1, values), Signal("length/tokens", True, -1, other)]
    lines = report.verdict(evaluate_signals(items, signals, resamples=300, seed=0))
    assert [line.rsplit(", ", 1)[1] for line in lines] == [verdict] * 3


def test_the_help_names_the_tasks_and_matchers(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "correctness", "--help"])
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in TASKS)
    assert all(f"  {name} " in told for name in ("exact", "contains", "numeric", "choice"))
