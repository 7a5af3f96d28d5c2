"""Questions of reasoning-gym, judged by its scorers."""

from cme.tasks.generated import answered_by_numbers, scored_by
from cme.tasks.questions import Question


def test_scorers_of_reasoning_gym_get_the_answer_and_its_entry():
    question = Question("1", "?", ("7",), metadata={"secret": "9"})

    def score(text, entry):
        return 1.0 if text == entry["secret"] else 0.5

    matcher = scored_by(score, numeric=True)
    assert matcher.is_correct("It is 9.", question)
    assert matcher.is_correct("7 <answer> 9 </answer> 8", question)
    assert matcher.is_correct("It is $9.00.", question)
    assert not matcher.is_correct("It is 7.", question)
    assert not matcher.is_correct("none", question)
    words = Question("2", "?", ("a b",), metadata={"secret": "9 lives"})
    assert scored_by(score, numeric=False).is_correct(" 9 lives\n", words)


def test_where_an_answer_is_does_not_depend_on_the_right_one():
    days, count = (Question("1", "?", (answer,)) for answer in ("Monday", "7"))
    for numeric, text in ((True, "7"), (False, "On day 7.")):
        find = scored_by(lambda text, entry: 0.0, numeric=numeric).find
        found = find("On day 7.", days)
        assert found == find("On day 7.", count)
        assert "On day 7."[found.start : found.end] == text
    assert answered_by_numbers([{"answer": "7"}, {"answer": None}, {"answer": 1.5}])
    assert not answered_by_numbers([{"answer": "7"}, {"answer": "Monday"}])
    assert not answered_by_numbers([{"answer": None}])
