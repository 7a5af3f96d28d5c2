"""Answers in LaTeX, compared by math-verify."""

import pytest

from cme.tasks.expressions import MATH
from cme.tasks.questions import Question

ANY = Question("1", "?", ("42",))


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
    keys = {MATH.find(response, ANY).key for response in (r"\boxed{p-q}", r"So \boxed{-q + p}.")}
    assert len(keys) == 1
    half = r"So $\boxed{\frac{1}{2}}$."
    found = MATH.find(half, ANY)
    assert half[found.start : found.end] == r"\frac{1}{2}"
