import hashlib

import pytest

from cme.tasks.capitals import HELD_OUT, is_correct, load_capitals


@pytest.fixture(scope="module")
def splits():
    return load_capitals("train"), load_capitals("held_out")


@pytest.fixture(scope="module")
def answers(splits):
    return {question.id: question.answers[0] for split in splits for question in split}


def test_split_is_the_same_on_every_machine(splits):
    train, held_out = splits
    assert (len(train), len(held_out)) == (147, HELD_OUT)
    listed = "\n".join(f"{question.id}\t{question.answers[0]}" for question in held_out)
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == "846f111dce14378c"


def test_no_country_is_in_both_splits_or_twice(splits):
    train, held_out = ([question.id for question in split] for split in splits)
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)


def test_question(splits):
    question = next(question for question in splits[1] if question.id == "the Netherlands")
    assert question.prompt == [
        {"role": "user", "content": "Answer briefly. What is the capital of the Netherlands?"}
    ]
    assert question.text == "What is the capital of the Netherlands?"
    assert question.answers == ("Amsterdam",)


def test_a_copy_of_the_question_is_never_right(splits):
    for split in splits:
        for question in split:
            (answer,) = question.answers
            assert not is_correct(question.prompt[0]["content"], answer), question
            assert is_correct(f"The capital of {question.id} is {answer}.", answer), question


@pytest.mark.parametrize(
    "country", ["Singapore", "Monaco", "San Marino", "Guinea-Bissau", "Israel", "Antarctica", "Burma", "Scotland"]
)
def test_left_out(answers, country):
    assert country not in answers


@pytest.mark.parametrize(
    ("country", "capital"),
    [
        ("Kazakhstan", "Astana"),
        ("Eswatini", "Mbabane"),
        ("Burundi", "Gitega"),
        ("the Democratic Republic of the Congo", "Kinshasa"),
        ("the Republic of the Congo", "Brazzaville"),
        ("the United States Virgin Islands", "Charlotte Amalie"),
    ],
)
def test_data_is_mended(answers, country, capital):
    assert answers[country] == capital


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The capital of France is PARIS!", "Paris"),
        ("Paris's museums", "Paris"),
        ("brasilia", "Brasília"),
        ("Hagatna", "Hagåtña"),
        ("It is Washington, DC.", "Washington D.C."),
        ("Washington", "Washington D.C."),
        ("Saint George’s", "St. George's"),
        ("St Georges", "St. George's"),
        ("St. John's", "Saint John's"),
        ("Ndjamena", "N'Djamena"),
        ("N’Djamena.", "N'Djamena"),
        ("Sanaa", "Sana'a"),
        ("Port-of-Spain", "Port of Spain"),
        ("Kiev", "Kyiv"),
        ("La Paz", "Sucre"),
    ],
)
def test_right(response, answer):
    assert is_correct(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "Paris"),
        ("The capital of Poland is Poland.", "Warsaw"),
        ("Parisian", "Paris"),
        ("Rome", "Romeo"),
        ("Mexico", "Mexico City"),
        ("Port Spain", "Port of Spain"),
        ("Tunisia", "Tunis"),
    ],
)
def test_wrong(response, answer):
    assert not is_correct(response, answer)
