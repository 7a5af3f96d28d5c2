"""`cme eval text`: numbers against their definitions, and the command on files and on tiny models."""

import json
import math

import pytest
import tiny
import torch

import cme.evaluation.generate as sampled
from cme.cli import main
from cme.diagnostics import byte_counts, distinct_rate, jensen_shannon
from cme.errors import DatasetError
from cme.evaluation.text.divergence import likelihood_metrics, policy_of
from cme.evaluation.text.metrics import Response, by_prompt, byte_drift, compare, text_metrics
from cme.evaluation.text.options import GENERATION
from cme.evaluation.text.run import load_prompts, read_responses
from cme.tasks.matchers import EXACT, Task
from cme.tasks.questions import Question
from cme.tasks.registry import TASKS
from cme.text.rendering import encode_prompt


def test_distinct_ngrams_are_counted_over_all_texts():
    assert distinct_rate(["a b a", "A c"], 1) == 3 / 5
    assert distinct_rate(["a b a b", "c"], 2) == 2 / 3
    assert distinct_rate(["", "a"], 2) is None


def test_jensen_shannon_is_a_divergence_in_bits():
    a, b = byte_counts(["aab"]), byte_counts(["ab"] * 3)
    assert a[ord("a")] == 2
    assert jensen_shannon(a, 5 * a) == 0
    assert jensen_shannon(byte_counts(["abc"]), byte_counts(["xyz"])) == 1
    p, q = 2 / 3, 1 / 2
    m = (p + q) / 2

    def entropy(x):
        return -x * math.log2(x) - (1 - x) * math.log2(1 - x)

    assert jensen_shannon(a, b) == pytest.approx(entropy(m) - (entropy(p) + entropy(q)) / 2)
    assert jensen_shannon(a, b) == jensen_shannon(b, a)
    assert math.isnan(jensen_shannon(a, byte_counts([])))
    assert byte_counts(["é"]).sum() == 2


def test_a_change_is_paired_by_prompt():
    # Prompts differ much, each grows by 3 words: no uncertainty
    a = [Response(f"p{n}", "w " * n, finished=True) for n in range(1, 9)]
    b = [Response(f"p{n}", "w " * (n + 3), finished=n % 2 == 0) for n in range(1, 9)]
    a, b = by_prompt(a), by_prompt(b)
    rows = {row.metric: row for row in compare(text_metrics(a, b), text_metrics(b, a))}
    assert rows["words"].interval_95 == pytest.approx((3, 3))
    assert (rows["words"].a, rows["words"].b, rows["words"].difference) == (4.5, 7.5, 3)
    assert rows["truncated_rate"].difference == 0.5
    assert rows["finished_rate"].difference == -0.5
    assert "tokens" not in rows


def test_a_prompt_counts_once_however_many_responses_it_has():
    side = by_prompt([Response("p", ""), Response("p", "x y"), Response("q", "x x"), Response("q", "x x")])
    metrics = text_metrics(side, side)
    assert metrics["empty_rate"] == {"p": 0.5, "q": 0}
    assert metrics["distinct_1"] == {"p": 1, "q": 0.25}


def test_more_responses_are_not_taken_for_less_distinct_ones():
    a, b = by_prompt([Response("p", "x y")]), by_prompt([Response("p", "x y")] * 4)
    (row,) = (r for r in compare(text_metrics(a, b), text_metrics(b, a)) if r.metric == "distinct_1")
    assert (row.a, row.b, row.difference) == (1, 1, 0)


def test_means_are_over_the_prompts_that_have_the_metric_on_both_sides():
    (row,) = compare({"m": {"p": 1.0, "q": 9.0}}, {"m": {"p": 2.0}})
    assert (row.a, row.b, row.difference) == (1, 2, 1)
    (row,) = compare({"m": {"p": 1.0, "q": 9.0}}, {})
    assert (row.a, row.b, row.difference) == (5, None, None)


def test_another_script_drifts_and_the_same_text_does_not():
    texts = ["in the town", "on the hill", "at the mill"] * 4
    english = by_prompt(Response(f"p{i}", text) for i, text in enumerate(texts))
    russian = by_prompt(Response(prompt, "в городе") for prompt in english)
    assert byte_drift(english, english)["value"] == 0
    drift = byte_drift(english, russian)
    low, high = drift["interval_95"]
    assert 0.7 < low <= drift["value"] <= high <= 1
    assert drift["halves_of_a"] < 0.1


@torch.no_grad()
def test_kl_estimates_are_schulmans():
    tokenizer = tiny.tokenizer()
    start = tiny.llama(0)
    trained = tiny.llama(0)
    trained.lm_head.weight.mul_(0.9)
    prompts = {"p": "Where is Paris?"}
    text = "The capital of France is Paris."
    policies = [policy_of(model, tokenizer, GENERATION) for model in (trained, start)]
    got = likelihood_metrics(*policies, prompts, by_prompt([Response("p", text)]))
    ids, before = tokenizer(text)["input_ids"], encode_prompt(tokenizer, prompts["p"])
    b, a = (
        m(torch.tensor([before + ids]))
        .logits[0, len(before) - 1 : -1]
        .double()
        .log_softmax(-1)[range(len(ids)), ids]
        for m in (trained, start)
    )
    assert got["kl_k1"]["p"] == pytest.approx(float((b - a).mean()), abs=1e-4)
    assert got["kl_k3"]["p"] == pytest.approx(float(((a - b).exp() - 1 - (a - b)).mean()), abs=1e-4)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(tmp_path):
    prompts = [f"What is the capital of {c}?" for c in ("France", "Poland", "Peru")]
    a = [{"prompt": p, "response": "I think it is a city", "finish_reason": "length"} for p in prompts]
    b = [{"prompt": p, "responses": [p, "Lima"], "finished": True} for p in prompts]
    return write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)


def test_two_files_become_a_table_json_and_a_picture(tmp_path, capsys):
    a, b = files(tmp_path)
    assert main(["eval", "text", a, b, "-o", str(tmp_path / "out")]) == 0
    assert "| echo_rate | 0.000 | 0.500 | +0.500 | [+0.500, +0.500] |" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "text.json").read_text())
    rows = {row["metric"]: row for row in result["metrics"]}
    assert rows["truncated_rate"]["a"] == 1
    assert rows["truncated_rate"]["b"] == 0
    assert "entropy" not in rows
    assert 0 < result["byte_drift"]["value"] < 1
    assert (tmp_path / "out" / "text.png").read_bytes().startswith(b"\x89PNG")
    assert "byte drift" in (tmp_path / "out" / "text.md").read_text()


def test_a_csv_says_which_responses_ended_by_themselves(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,finished\n1,007,true\n2,b,False\n3,c,\n4,d,length\n")
    found = read_responses(tmp_path / "a.csv")
    assert [(r.prompt, r.finished) for r in found] == [("1", True), ("2", False), ("3", None), ("4", False)]
    assert found[0].text == "007"


@pytest.mark.parametrize("tokens", [[{"token": "L", "logprob": -0.5}], "5", "a b", 2.5, True, None])
def test_a_column_of_tokens_that_is_no_count_is_not_taken_for_one(tmp_path, capsys, tokens):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Who?", "response": "Lima", "tokens": tokens}])
    assert main(["eval", "text", path, path, "-o", str(tmp_path / "out")]) == 0
    assert "| tokens |" not in capsys.readouterr().out


def test_a_number_that_is_not_finite_is_unknown(tmp_path):
    inf = {"p": 1.0, "q": math.inf}
    (change,) = compare({}, {"kl_k3": inf})
    assert (change.a, change.b, change.difference, change.interval_95) == (None, None, None, None)
    (change,) = compare({"entropy": {"p": 1.0, "q": 1.0}}, {"entropy": inf})
    assert (change.a, change.b, change.difference, change.interval_95) == (1.0, None, None, None)


def test_a_tiny_temperature_leaves_what_is_infinite_unknown(tiny_models, tmp_path, capsys):
    trained = str(tmp_path / "trained")
    tiny.llama(7).save_pretrained(trained)
    tiny.tokenizer().save_pretrained(trained)
    args = ["eval", "text", tiny_models["generator"], trained, "--prompts", files(tmp_path)[0]]
    args += ["--max-new-tokens", "5", "--temperature", "1e-5", "-o", str(tmp_path / "out")]
    assert main(args) == 0
    assert "| kl_k3 | – | – | – |" in capsys.readouterr().out
    rows = {row["metric"]: row for row in json.loads((tmp_path / "out" / "text.json").read_text())["metrics"]}
    assert rows["kl_k3"]["b"] is None


@pytest.mark.parametrize("prompt", ["", " \n", [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_an_error(tmp_path, prompt):
    path = write(tmp_path / "p.jsonl", [{"prompt": "Who?"}, {"prompt": prompt}])
    with pytest.raises(DatasetError, match=r"row 2 of .*p.jsonl has an empty prompt"):
        load_prompts(path, None)


def test_two_models_are_compared_and_a_run_resumes_where_it_stopped(tiny_models, tmp_path, capsys, monkeypatch):
    _, prompts = files(tmp_path)
    model = tiny_models["generator"]
    other = tiny.llama(0)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    other.save_pretrained(tmp_path / "trained")
    tiny.tokenizer().save_pretrained(tmp_path / "trained")
    args = ["eval", "text", model, str(tmp_path / "trained"), "--prompts", prompts, "--samples", "2"]
    args += ["--max-new-tokens", "5", "--batch-size", "4", "-o", str(tmp_path / "out")]
    assert main(args) == 0
    result = json.loads((tmp_path / "out" / "text.json").read_text())
    rows = {row["metric"]: row for row in result["metrics"]}
    assert rows["entropy"]["b"] < rows["entropy"]["a"]  # its logits are larger
    assert rows["kl_k3"]["b"] > 0.1
    assert rows["kl_k3"]["a"] is None
    assert 1 <= rows["tokens"]["a"] <= 5

    first = (tmp_path / "out" / "responses_a.jsonl").read_bytes()
    journals = [tmp_path / "out" / "journal" / f"{side}.jsonl" for side in "ab"]
    whole = [journal.read_bytes() for journal in journals]
    journals[1].write_bytes(whole[1][:-20])  # as a kill leaves it
    (tmp_path / "out" / "text.json").unlink()
    batches = []
    generate = sampled.generate
    with monkeypatch.context() as patched:
        patched.setattr(sampled, "generate", lambda *a, **k: batches.append(1) or generate(*a, **k))
        assert main(args) == 0
    assert len(batches) == 1  # the others are read
    assert [journal.read_bytes() for journal in journals] == whole
    assert json.loads((tmp_path / "out" / "text.json").read_text()) == result
    assert main([*args, "--seed", "1"]) == 1
    assert "is of a run with seed = 0, not 1" in capsys.readouterr().err
    assert main([*args, "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "out" / "responses_a.jsonl").read_bytes() != first


def test_responses_that_are_not_samples_of_the_distribution_are_noted(tiny_models, tmp_path, capsys):
    model = tiny_models["generator"]
    args = [
        "eval",
        "text",
        model,
        model,
        "--prompts",
        files(tmp_path)[0],
        "--max-new-tokens",
        "3",
        "--top-p",
        "0.9",
    ]
    assert main([*args, "-o", str(tmp_path / "out")]) == 0
    assert "sampled with top-p 0.9, entropy and KL of the whole distributions" in capsys.readouterr().out
    rows = {row["metric"]: row for row in json.loads((tmp_path / "out" / "text.json").read_text())["metrics"]}
    assert rows["kl_k1"]["b"] == rows["kl_k3"]["b"] == 0
    found = read_responses(tmp_path / "out" / "responses_a.jsonl")  # as any file of responses
    assert len(found) == 3
    assert all(1 <= response.tokens <= 3 for response in found)


def test_the_prompts_of_a_task_are_those_that_training_does_not_see(monkeypatch):
    toys = Task("toys", "", lambda split: [Question(split, f"Is this {split}?", ("yes",))], EXACT)
    monkeypatch.setitem(TASKS, "toys", toys)
    assert load_prompts("toys", None) == [[{"role": "user", "content": "Is this held_out?"}]]


def test_responses_of_other_weights_or_to_other_prompts_are_not_taken(tmp_path, capsys):
    a, b = ({"prompt": p, "response": "Lima"} for p in ("Who?", "Why?"))
    model = str(tmp_path / "model")
    tiny.llama(0).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    asked = write(tmp_path / "asked.jsonl", [a])
    args = ["eval", "text", model, write(tmp_path / "a.jsonl", [a, b]), "--prompts", asked]
    args += ["--max-new-tokens", "3", "-o", str(tmp_path / "out")]
    assert main(args) == 1  # A has no response to the second prompt
    write(tmp_path / "asked.jsonl", [a, b])
    assert main(args) == 1
    assert "a.jsonl is of a run of other prompts" in capsys.readouterr().err
    assert main([*args, "--overwrite"]) == 0
    assert main(args) == 0
    tiny.llama(1).save_pretrained(model)
    assert main(args) == 1
    assert "a.jsonl is of a run of a model with other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: [a, "no-such-model"], "--prompts is missing"),
        (lambda a, b: [a, "no-such.jsonl"], "there is no file 'no-such.jsonl'"),
        (lambda a, b: [a, "no-such-model", "--prompts", a], "could not load the generator 'no-such-model'"),
    ],
)
def test_errors_name_the_bad_value(tmp_path, change, message, capsys):
    assert main(["eval", "text", *change(*files(tmp_path)), "-o", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_a_prompt_missing_on_one_side_is_an_error(tmp_path, capsys):
    a, b = files(tmp_path)
    short = write(tmp_path / "short.jsonl", [{"prompt": "Hi", "response": "Ho"}])
    assert main(["eval", "text", a, short, "-o", str(tmp_path / "out")]) == 1
    assert "3 prompts have no response of B, such as 'What is the capital of France?'" in capsys.readouterr().err
    none = write(tmp_path / "none.jsonl", [{"prompt": "Hi", "text": "Ho"}])
    assert main(["eval", "text", none, b, "-o", str(tmp_path / "out")]) == 1
    assert "none.jsonl has no column 'response'" in capsys.readouterr().err
