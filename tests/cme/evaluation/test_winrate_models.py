"""`cme eval winrate` with models: responses that are generated and kept, and a local judge."""

import json
import os
import shutil

import pytest
import tiny

from cme.cli import main
from cme.evaluation import generate as sampled
from cme.evaluation.generate import Generated
from cme.evaluation.winrate import outcomes
from cme.evaluation.winrate.inputs import Contestant, Prompt, generated_responses
from cme.evaluation.winrate.judges import LABELS, LocalJudge
from cme.evaluation.winrate.options import OneResponse, Options
from cme.models import model_files
from cme.options import ModelOptions
from cme.verifier import Verifier

PROMPTS = [
    Prompt(str(i), f"What is the capital of {c}?")
    for i, c in enumerate(("France", "Peru", "Chad", "Fiji", "Oman"))
]
SHORT = OneResponse(max_new_tokens=6, batch_size=2)


def respond(model, how, output):
    options = Options(output=output, generation=how, progress=False)
    return generated_responses(Contestant("model", model), PROMPTS, options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, seed, chat in (("after", 0, True), ("before", 1, True), ("plain", 2, False)):
        folder = tmp_path_factory.mktemp("models") / name
        tiny.llama(seed, max_position_embeddings=1024).save_pretrained(folder)
        tiny.tokenizer(chat).save_pretrained(folder)
        made[name] = str(folder)
    return made


def test_responses_are_kept_and_not_generated_again(folders, tmp_path, monkeypatch):
    first = respond(folders["after"], SHORT, tmp_path)
    assert list(first) == ["0", "1", "2", "3", "4"]
    monkeypatch.setattr(sampled, "load_model", lambda *_, **__: pytest.fail("loaded"))
    assert respond(folders["after"], SHORT, tmp_path) == first


@pytest.mark.parametrize("how", [SHORT, OneResponse(max_new_tokens=6, batch_size=2, temperature=1.0, seed=7)])
def test_a_torn_file_is_completed_to_the_same_responses(folders, tmp_path, how):
    whole = respond(folders["after"], how, tmp_path)
    (file,) = (tmp_path / "journal").iterdir()
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 4  # what it is of, and three batches
    file.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert respond(folders["after"], how, tmp_path) == whole
    assert file.read_bytes() == content


def test_sampling_follows_the_seed(folders, tmp_path):
    def sample(seed):
        how = OneResponse(max_new_tokens=6, batch_size=2, temperature=1.0, seed=seed)
        return respond(folders["after"], how, tmp_path / str(seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_checkpoint_that_was_replaced_is_another_model(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["after"], folder)
    first = respond(str(folder), SHORT, tmp_path / "out")
    before = model_files(str(folder))
    os.utime(folder / "model.safetensors", (0, 0))
    assert model_files(str(folder)) == before  # a copy is the same model
    tiny.llama(5, max_position_embeddings=1024).save_pretrained(folder)
    assert model_files(str(folder)) != before
    assert respond(str(folder), SHORT, tmp_path / "out") != first


def test_a_model_without_a_chat_template_stops_before_the_next_question(folders, tmp_path, monkeypatch):
    def generate(model, tokenizer, texts, sampling):
        assert texts[0].startswith("Question: What is the capital of ")
        assert texts[0].endswith("?\nAnswer:")
        return [Generated(" Lima.\nQuestion: Who?\nAnswer: Me", 12, False) for _ in texts]

    monkeypatch.setattr(sampled, "generate", generate)
    responses = respond(folders["plain"], SHORT, tmp_path)
    assert set(responses.values()) == {"Lima."}
    file = tmp_path / "responses" / "model.jsonl"
    assert all(json.loads(line)["finished"] for line in file.read_text().splitlines())


def test_what_comes_after_the_stop_does_not_count():
    tokenizer = tiny.tokenizer(chat=False)
    until = sampled._until("\nQuestion:", Generated(" Paris\nQuestion: Who?", 99, False), tokenizer)
    assert until == Generated("Paris", len(tokenizer.encode(" Paris")), True)
    whole = Generated("Paris", 99, False)
    assert sampled._until("\nQuestion:", whole, tokenizer) == sampled._until(None, whole, tokenizer) == whole


def test_a_prompt_that_is_too_long_is_named(folders, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "long", "prompt": "word " * 2000}) + "\n")
    arguments = [
        "eval",
        "winrate",
        folders["after"],
        folders["before"],
        "-o",
        str(tmp_path / "out"),
        "--no-progress",
    ]
    assert main([*arguments, "--prompts", str(tmp_path / "p.jsonl"), "--judge", "local:x"]) == 1
    told = capsys.readouterr().err
    assert "the prompt 'long' has" in told
    assert "more than its context of 1024" in told


def test_a_local_judge_takes_the_likeliest_label(folders):
    for name in ("before", "plain"):
        judge = LocalJudge(folders[name], ModelOptions())
        replies = {}
        judge.ask(["Which is better?", "And here?"], replies.__setitem__)
        verifier: Verifier = judge._verifier
        for i, text in enumerate(["Which is better?", "And here?"]):
            lead = "Verdict:"
            question = (
                f"{text}\n{lead}"
                if name == "plain"
                else [{"role": "user", "content": text}, {"role": "assistant", "content": lead}]
            )
            scores = [verifier.score([question], [f" {label}"])[0].sum_logprob for label in LABELS]
            best = LABELS[scores.index(max(scores))]
            assert replies[i].answer == f"Verdict: {best}"
            assert 0 < sum(replies[i].probabilities.values()) <= 1
            assert replies[i].failure is None


def test_a_local_judge_in_another_precision_is_another(folders):
    usual, half = (
        LocalJudge(folders["before"], ModelOptions(dtype=dtype)).identity for dtype in (None, "bfloat16")
    )
    assert usual != half
    assert usual == LocalJudge(folders["before"], ModelOptions()).identity


def test_a_local_judge_says_what_does_not_fit(folders):
    replies = {}
    LocalJudge(folders["before"], ModelOptions()).ask(["word " * 2000, "short"], replies.__setitem__)
    assert replies[0].failure == "refused"
    assert "context" in replies[0].error
    assert replies[1].failure is None


def test_two_models_and_a_local_judge_from_the_command_line(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(outcomes, "LC_RESAMPLES", 20)
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "prompt": p.prompt}) + "\n" for p in PROMPTS)
    )
    arguments = [
        *("eval", "winrate", folders["after"], folders["before"], "--prompts", str(tmp_path / "p.jsonl")),
        *("-o", str(tmp_path / "out"), "--judge", f"local:{folders['before']}"),
        *("--max-new-tokens", "6", "--batch-size", "2", "--no-progress"),
    ]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "A: after, B: before" in told
    files = sorted((tmp_path / "out" / "responses").iterdir())
    assert [file.name for file in files] == ["after.jsonl", "before.jsonl"]
    verdicts = (tmp_path / "out" / "verdicts.jsonl").read_text()
    monkeypatch.setattr(sampled, "load_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("cme.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(arguments) == 0
    assert (tmp_path / "out" / "verdicts.jsonl").read_text() == verdicts
    found = json.loads((tmp_path / "out" / "winrate.json").read_text())["comparisons"]["after vs before"]
    share = {"first": 1.0, "tie": 0.5, "second": 0.0}
    lines = [json.loads(line) for line in verdicts.splitlines()]
    shares = [share[line["verdict"]] if line["first"] == "after" else 1 - share[line["verdict"]] for line in lines]
    expected = (sum(shares) / 2 + 0.5 * found["identical"]) / len(PROMPTS)
    assert found["win_rate"] == pytest.approx(expected)
