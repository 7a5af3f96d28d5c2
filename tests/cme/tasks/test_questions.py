"""What is asked, and which questions training never sees."""

from cme.tasks.questions import Question, split_by_id


def test_options_are_shown_to_who_answers_and_to_who_judges_free_text():
    asked = Question("1", "Which?", ("b",), "Answer.", ("a", "b"))
    assert asked.prompt == [{"role": "user", "content": "Answer. Which?\nA. a\nB. b"}]
    assert asked.full_text == "Answer. Which?\nA. a\nB. b"
    assert Question("1", "What is this?", ("Lima",), "Answer briefly.").full_text == "What is this?"


def test_a_split_depends_on_ids_alone():
    questions = [Question(str(i), f"Question {i}?", ()) for i in range(300)]
    train, held_out = split_by_id(questions, "train"), split_by_id(questions, "held_out")
    assert {q.id for q in train} | {q.id for q in held_out} == {q.id for q in questions}
    assert not {q.id for q in train} & {q.id for q in held_out}
    assert 70 < len(held_out) < 130
    fewer = split_by_id(reversed(questions[50:]), "held_out")
    assert fewer == [q for q in held_out if int(q.id) >= 50]
