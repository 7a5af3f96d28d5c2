"""Command lines from dataclasses: names of options, and values that look like them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cme.options import Parser, option, parse


@dataclass(frozen=True)
class Inner:
    top_k: int = option(0, "candidates")


@dataclass(frozen=True)
class Outer:
    my_text: str = option("", "a text")
    names: tuple[str, ...] = option((), "several", name="my-name")
    rest: str | None = option(None, "the last", positional=True)
    inner: Inner = field(default_factory=lambda: Inner(top_k=3))


def read(*words: str) -> Outer:
    return parse(Parser(prog="command"), Outer, words)


@pytest.mark.parametrize("words", [["--my-text", "a_b"], ["--my_text", "a_b"], ["--my_text=a_b"], ["--my_te=a_b"]])
def test_names_may_have_underscores_and_values_keep_them(words):
    assert read(*words).my_text == "a_b"


@pytest.mark.parametrize("value", ["--x_y {prompt}", "--my_pre x", "-a_b c"])
def test_a_value_that_begins_with_dashes_stays_as_it_is(value):
    assert read("--my-text", value).my_text == value
    assert read(f"--my_text={value}").my_text == value


def test_words_after_two_dashes_are_values():
    assert read("--my-text", "a", "--", "--my_text").rest == "--my_text"


def test_options_of_dataclasses_within_are_options_with_their_defaults():
    assert read() == Outer("", (), None, Inner(3))
    assert read("--top_k", "5", "--my-name", "a", "--my_name", "b") == Outer("", ("a", "b"), None, Inner(5))
