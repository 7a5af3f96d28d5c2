"""What counts as right, and where the answer of a response is: texts, numbers and options."""

import pytest

from cme.errors import CMEError
from cme.tasks.matchers import CHOICE, CONTAINS, EXACT, NUMERIC
from cme.tasks.questions import Question
from cme.tasks.registry import MATCHERS

PERU = Question("1", "What is the capital of Peru?", ("Lima",), "Answer briefly.")
PORT = Question("2", "What is the capital of Trinidad?", ("Port of Spain",))
SUM = Question("3", "What is 1,200 + 34?", ("1234",))
ACIDS = Question("4", "Which?", ("Acid",), choices=("Nucleic acid", "Acid", "Water", "2"))


def answer(matcher, response, question):
    found = matcher.find(response, question)
    return None if found is None else (response[found.start : found.end], found.key)


@pytest.mark.parametrize(
    ("response", "right"), [("Lima", True), (" lima. ", True), ("LÍMA!", True), ("It is Lima", False), ("", False)]
)
def test_exact_is_the_whole_response(response, right):
    assert EXACT.is_correct(response, PERU) == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("The capital of Peru is Lima.", True),
        ("Limassol", False),
        ("It's LÍMA", True),
        ("Peru", False),
        ("", False),
    ],
)
def test_contains_finds_whole_words(response, right):
    assert CONTAINS.is_correct(response, PERU) == right


@pytest.mark.parametrize(
    ("question", "response", "extracted"),
    [
        (PERU, "The capital of Peru is Lima, a city of ten million.", "Lima"),
        (PERU, "Lima is the capital of Peru.", "Lima"),
        (PERU, "The capital city of the country is Lima. It lies in the west.", "Lima"),
        (PERU, "Peru: it is St. John's!", "St. John's"),
        (PORT, "It is Port of Spain in Trinidad", "Port of Spain"),
        (PERU, "The capital of Peru is Peru.", "The capital of Peru is Peru."),
    ],
)
def test_the_answer_is_what_the_response_adds_to_the_question(question, response, extracted):
    assert answer(CONTAINS, response, question)[0] == extracted


def test_finding_an_answer_does_not_look_at_the_right_one():
    other = Question(PERU.id, PERU.text, ("Cusco",))
    for response in ("The capital of Peru is Lima.", "Cusco", "Lima or Cusco"):
        assert CONTAINS.find(response, other) == CONTAINS.find(response, PERU)


@pytest.mark.parametrize(
    ("response", "found", "right"),
    [
        ("1,200 + 34 = 1,234", "1,234", True),
        ("The answer is 1234 because 34 is 34.", "1234", True),
        ("So #### 1,234.00", "1,234.00", True),
        (r"\boxed{1234} and 7", "1234", True),
        ("1234 and 7", "7", False),
        ("It is -1234.", "-1234", False),
        ("1200-34", None, False),
        ("I don't know", None, False),
    ],
)
def test_numeric_compares_values(response, found, right):
    assert NUMERIC.is_correct(response, SUM) == right
    assert (answer(NUMERIC, response, SUM) or [None])[0] == found


def test_numbers_of_equal_value_say_the_same():
    assert answer(NUMERIC, "1,234.0", SUM)[1] == answer(NUMERIC, "$1234", SUM)[1]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. Acid", "B"),
        ("The answer is B.", "B"),
        ("Acid", "B"),
        ("It is the nucleic acid.", "A"),
        ("I think it is (C), not A", "C"),
        ("A word: water", "C"),
        ("(A) is wrong because of x. So it is (B).", "B"),
        ("(A) is wrong. (B) is better.", None),
        ("Answer: A would be wrong here.\nAnswer: C", "C"),
        ("Answer: A would be wrong here.", None),
        ("Answer: A.\nWait: the answer is B.", "B"),
        ("The answer is not A.", None),
        ("Answer: A or B", None),
        ("The answer is A? No, B.", None),
        ("The answer is (B) acid? No, (C).", None),
        ("The answer is A? No, the answer is B.", "B"),
        ("Answer: A, B", None),
        ("Answer: B, since A is wrong", "B"),
        ("The answer is: **B. Acid**", "B"),
        ("The correct option is (B) acid", "B"),
        ("<answer>B</answer>", "B"),
        (r"The answer is $\boxed{\textbf{(B)}}$", "B"),
        ("B. Acid\n\nOption A has more in it.", "B"),
        ("A. Nucleic acid\nB. Acid\nC. Water\nD. 2", None),
        ("A. Nucleic acid\nB. Acid\nC. Water\nThe answer is B.", "B"),
        ("Option B is right; option A is not.", None),
        ("<think>Answer: A</think>\nB", "B"),
        ("Answer: A. No.</think>Answer: B", "B"),
        ("<think>Answer: A", None),
        ("Water or acid", None),
        ("", None),
    ],
)
def test_choice_takes_letters_and_texts(response, letter):
    assert (answer(CHOICE, response, ACIDS) or [None, None])[1] == letter
    assert CHOICE.is_correct(response, ACIDS) == (letter == "B")


def test_choice_with_options_beyond_the_alphabet_is_refused():
    many = Question("1", "?", ("1",), choices=tuple(map(str, range(27))))
    assert CHOICE.objection(many) == "has 27 options: the matcher 'choice' needs 1 to 26"
    assert CHOICE.objection(ACIDS) is None


def test_choice_needs_options():
    with pytest.raises(CMEError, match="the question '1' has no options"):
        CHOICE.find("A", PERU)


@pytest.mark.parametrize("name", ["exact", "contains", "numeric", "choice"])
def test_no_matcher_reads_thoughts(name):
    question = Question("1", "Which?", ("2",), choices=("1", "2", "3"))
    matcher, right, wrong = MATCHERS[name], "2", "3"
    for before in ("<think>{}</think>\n", "{}\n</think>\n\n", "<thinking>\n{}</thinking>"):
        assert matcher.is_correct(before.format(wrong) + right, question)
        assert not matcher.is_correct(before.format(right) + wrong, question)
        assert answer(matcher, before.format(wrong) + right, question)[0] == right
        assert answer(matcher, before.format(wrong) + right, question) == answer(matcher, right, question)
    assert not matcher.is_correct(f"<think>{right}", question)
    assert matcher.find(f"<think>{right}", question) is None


def test_golds_that_cannot_be_read_are_objected_to():
    def objection(name, *golds):
        return MATCHERS[name].objection(Question("1", "?", golds))

    assert objection("numeric", "72", "1%", "4 + 3 = <<4+3=7>>7\n#### 7", r"\frac12") is None
    for gold in ("abc", "1,2", "7 or 8", "5 ft 7 in", "She has 72 apples.", "1/0", "nan"):
        assert objection("numeric", "72", gold) == f"has the answer {gold!r}, which is no number"
    assert objection("contains", "x", "?!") == "has the answer '?!', in which there is no word"
    assert objection("exact", "?!") is None
    pytest.importorskip("math_verify")
    assert (
        objection("math", r"\frac{\pi}{2}", "Evelyn", r"\text{not at all or always}", r"Thus it is \boxed{3}.")
        is None
    )
    for gold in ("Thus the number of them is 3.", "no idea at all"):
        assert objection("math", gold) == f"has the answer {gold!r}, which is no expression"
    assert objection("math", " ") == "has the answer ' ', which is no expression"
