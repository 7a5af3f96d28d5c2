"""Which answers of a judge are verdicts, and which are not."""

import pytest

from cme.errors import CMEError
from cme.evaluation.winrate.template import DEFAULT, JudgePrompt, shown
from cme.evaluation.winrate.verdict import parse


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Verdict: 1", "first"),
        ("Verdict: 2", "second"),
        ("Verdict: tie", "tie"),
        ("verdict: TIE.", "tie"),
        ("**Verdict:** 2\n", "second"),
        ("VERDICT - Response 1", "first"),
        ("Verdict: [2]", "second"),
        ("Response 2 is wrong about bees.\n\nVerdict: 1", "first"),
        ("Verdict: 1\nbecause Response 2 is wrong", "first"),
        ("Verdict: 1\nVerdict: 1", "first"),
        ("[[A]]", "first"),
        ("My final verdict is: [[B]]", "second"),
        ("[[C]]", "tie"),
        ("b", "second"),
        (" 1. ", "first"),
        ("Response B", "second"),
        ("<think>Verdict: 1? No.\nVerdict: 1\n</think>\nVerdict: 2", "second"),
    ],
)
def test_verdicts(answer, verdict):
    assert parse(answer) == verdict


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I can't decide.",
        "Verdict: 3",
        "Verdict: 1 or 2",
        "Verdict: 12",
        "Verdict: 1\nVerdict: 2",
        "[[A]] or [[B]]",
        "Response 1 is better",  # not in the form that was asked for
        "1 of the responses is better",
        "A cat purrs",
        "<think>\nVerdict: 1\n",  # cut off in the middle of a thought
        "Verdict:",
    ],
)
def test_everything_else_is_none(answer):
    assert parse(answer) is None


def test_a_verdict_that_was_cut_off_may_have_been_taken_back():
    answer = "Verdict: 1\nHmm, on reflection the second one is mo"
    assert (parse(answer), parse(answer, cut_off=True)) == ("first", None)
    assert parse("2", cut_off=True) == "second"  # as with max_tokens=1


def test_the_default_prompt_asks_for_what_is_understood():
    asked = [line for line in DEFAULT.splitlines() if line.startswith("Verdict:")]
    assert [parse(line) for line in asked] == ["first", "second", "tie"]


def test_texts_that_look_like_fields_stay_as_they_are():
    prompt = JudgePrompt('{"json": 1} {prompt}|{first}|{second}')
    assert prompt.render("{first}", "{second}", "{prompt} {x}") == '{"json": 1} {first}|{second}|{prompt} {x}'


def test_a_conversation_is_shown_with_its_roles():
    message = {"role": "user", "content": "Hi"}
    assert shown([message]) == "Hi"
    assert shown([{"role": "system", "content": "Be brief."}, message]) == "system: Be brief.\n\nuser: Hi"


@pytest.mark.parametrize("text", ["{prompt} {first}", "{prompt} {first} {second} {second}"])
def test_a_prompt_without_its_fields_is_refused(text):
    with pytest.raises(CMEError, match=r"\{second\} [02] times"):
        JudgePrompt(text)


def test_other_words_are_another_hash(tmp_path):
    (tmp_path / "mine.txt").write_text("{prompt} {first} {second}")
    assert JudgePrompt.read(tmp_path / "mine.txt").sha256 != JudgePrompt.read(None).sha256
    with pytest.raises(CMEError, match=r"no\.txt"):
        JudgePrompt.read(tmp_path / "no.txt")
