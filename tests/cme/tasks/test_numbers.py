"""Numbers in texts: the same grammar for right answers and for responses, and no number where there is none."""

from fractions import Fraction

import pytest

from cme.tasks.choices import find_choice
from cme.tasks.numbers import find_number, is_number, read_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-7", -7),
        ("−7", -7),
        ("+5", 5),
        (".5", 0.5),
        ("5.", 5),
        ("007", 7),
        ("1,234.5", 1234.5),
        ("10 000", 10_000),
        ("10\u202f000", 10_000),
        ("10\u2009000.25", 10_000.25),
        ("9{,}500", 9500),
        (r"9\,500", 9500),
        (r"11,\! 111,\! 100", 11_111_100),
        ("1_000", 1000),
        ("$7", 7),
        (r"\$18.50", 18.5),
        ("-$5", -5),
        ("€-5", -5),
        ("3.2e5", 320_000),
        ("1e-05", Fraction(1, 100_000)),
        (r"3.2 \times 10^5", 320_000),
        (r"3.2 \cdot 10^{-2}", Fraction(4, 125)),
        ("3.2×10^5", 320_000),
        ("3/4", 0.75),
        ("-3/4", -0.75),
        ("3 / 4", 0.75),
        ("1 1/2", 1.5),
        ("-1 1/2", -1.5),
        (r"\frac{3}{4}", 0.75),
        (r"\dfrac12", 0.5),
        (r"-\tfrac{3}{4}", -0.75),
        (r"\frac{-3}{4}", -0.75),
        (r"1\frac{1}{2}", 1.5),
        ("5 million", 5_000_000),
        ("2 hundred", 200),
        ("3 dozen", 36),
        ("minus 18", -18),
        ("Negative 18", -18),
        ("½", 0.5),
        ("1½", 1.5),
        ("-2 ⅓", Fraction(-7, 3)),
        ("1%", 1),
        (r"1\%", 1),
        ("1 percent", 1),
    ],
)
def test_a_number_is_read_alone_and_found_in_a_response(text, value):
    assert is_number(text) == (text != "5.")
    assert read_number(text).value == value
    for response in ("The answer is {}.", r"So $\boxed{{{}}}$, from 99 on.", "#### {}", "99 is wrong: {}"):
        found = find_number(response.format(text))
        assert found.value == value, response
        assert response.format(text)[found.start : found.end] == text.rstrip(".")
        assert found.is_percent == (text[0] == "1" and text[-1] in "%t")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "abc",
            "-",
            "nan",
            "inf",
            "1,2",
            "1,000,00",
            "12,34,567",
            "1.234.567",
            "1/0",
            "1/2/2024",
            "2024-01-01",
        ),
        *(
            "7 or 8",
            "3 and 4",
            "3, 4",
            "10-15",
            "10 to 15",
            "12:30",
            "5 ft 7 in",
            "5 hours 30 minutes",
            "- 5",
            "0x1F",
        ),
        *(
            "6*7",
            "2^10",
            r"2^{10}",
            r"\sqrt{2}",
            r"3\sqrt{2}",
            r"5\pi",
            "5π",
            "5x",
            r"\frac{\pi}{2}",
            r"\frac{2}{x}",
        ),
        *(
            r"\log 5",
            "x > 5",
            r"x \ge 5",
            "(1, 2)",
            "±3",
            "2516_8",
            "She has 72 apples",
            "42, or so",
            "1e999999999",
        ),
        "1" * 5000,
        *(
            "10⁶",
            "10⁻³",
            "2.5½",
            "$1.5M",
            "1.5bn",
            "1.5 M",
            "2k",
            "3i",
            "5n",
            "50‰",
            "10+",
            "5 ± 1",
            "2 hundred thousand",
        ),
        *(
            r"0.\overline{3}",
            r"0.1\overline{3}",
            "0.3\u0305",
            "0.(3)",
            "3 tenths",
            "2 and a half",
            "5 squared",
            "5!!",
        ),
        *("5 : 1", "1 in 5", "5 plus 3", "5 below zero", "5 degrees below zero", "3 or more", "42?"),
        *(
            "not 18",
            "less than 18",
            "at least $18",
            "no more than 18",
            "over 18",
            "isn't negative 18",
            "x minus 3",
        ),
    ],
)
def test_what_is_no_number_is_not_read(text):
    assert read_number(text) is None
    assert not is_number(text)
    if text != "42, or so":
        assert find_number(rf"I say 9: \boxed{{{text}}}") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72 km/h", 72),
        ("$42 dollars", 42),
        ("USD 5", 5),
        ("Rs. 500", 500),
        ("10 cm^2", 10),
        (r"90^\circ", 90),
        (r"5\,\text{cm}", 5),
        (r"5 \text{ cm}^2", 5),
        ("300 K", 300),
        ("72 km per hour", 72),
        ("x = 5", 5),
        ("about 5", 5),
        ("6 * 7 = 42", 42),
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 72),
    ],
)
def test_right_answers_may_have_a_unit_or_a_solution_before_them(text, value):
    assert read_number(text).value == value
    assert not is_number(text)


@pytest.mark.parametrize("text", ["1 2", "5!", "5! ways", "12 34 56"])
def test_a_right_answer_is_one_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("The answer is: 42, since 6*7 holds for 2 numbers", "42"),
        ("**Answer**: 42 apples out of 50", "42"),
        ("**Answer:** 42 apples out of 50", "42"),
        ("The answer to the question is about 42 out of 50", "42"),
        ("The answer is <b>42</b>, 7 left", "42"),
        ("<answer>\n$42\n</answer> of 50", "$42"),
        ("The answer is\n\n42\n\nThat took 3 steps.", "42"),
        ("The answer is $3.50. Check: 7", "$3.50"),
        ("The answer is 6*7 = 42.", "42"),
        ("The answer is 5 + 3 = 8", "8"),
        ("The answer is 50? No. The answer is 42.", "42"),
        ("The answer is not 50 but 42", "42"),
        ("The answer is the sum of 3 and 4, so 7.", "7"),
        ("The answer is 3 and 4", None),
        ("The answer is 2^10, not 5", None),
        ("The answer is 5 hours 30 minutes", None),
        ("#### 1. Add\n#### 2. Sum up\nIt is 42.", "42"),
        ("#### 42 of 50\n", "42"),
        (r"The answer is $\boxed{\text{42 apples}}$.", "42"),
        (r"\boxed{6 \times 7 = 42}, in 3 steps", "42"),
        (r"\boxed{none} of 3", None),
        ("In 2019, 42 people came.", "42"),
        ("12 is 6 x 7", None),
        ("so 6*7=42", "42"),
        ("It takes 5 hours 30 minutes", None),
        ("x = 12\n- 42 apples", "42"),
        ("答案是42。", "42"),
        ("I paid Rs.500", "500"),
        ("It's 42nd!", "42"),
        ("gpt-4", "4"),
        ("H2O", None),
        ("v1.2", None),
        ("So 3...", "3"),
        ("none", None),
        ("The answer is 42!", "42"),
        (r"\boxed{5!}", None),
        ("The answer is minus 18", "minus 18"),
        ("The answer is 50? No, it is 42.", None),
        ("Is it 42?", None),
        *(
            (f"The answer is {text}.", None)
            for text in ("not 18", "less than 18", "at least 18", "no more than 18")
        ),
        *(
            (f"The answer is {text}", None)
            for text in ("10⁶", "5 : 1", "5i", "1 in 5", "10⁻³", "not equal to $18")
        ),
    ],
)
def test_the_number_of_a_response_is_the_stated_one_else_the_last(response, found):
    number = find_number(response)
    assert (None if number is None else response[number.start : number.end]) == found


@pytest.mark.parametrize(
    ("gold", "answer", "agree"),
    [
        ("1%", "1%", True),
        ("1%", "1", True),
        ("1", "1%", True),
        ("1%", "0.01", True),
        ("0.01", "1%", True),
        ("1%", "100", False),
        ("1%", "0.01%", False),
        ("0.5", ".5", True),
        ("1,234", "1234.00", True),
        ("1/3", "0.333", False),
    ],
)
def test_percentages_agree_by_number_and_by_value(gold, answer, agree):
    assert read_number(gold).agrees(find_number(answer)) == agree


@pytest.mark.parametrize(
    "piece",
    [
        *("1", "1,", "1 ", "{", "-", "1-", "- a ", r"\frac{1}{", "The answer is 1 234 {"),
        *("answer: ", "answer to ", "answer: A, ", "####", "#### ", "<answer>", r"\boxed{", "Option "),
    ],
)
def test_time_grows_with_the_length_of_a_text_not_with_its_square(piece):
    text = piece * (60_000 // len(piece))  # the square would take minutes
    assert read_number(text) is None
    find_number("answer: " + text)
    assert find_choice(text, ["x", "y"]) is None or "A" in piece
