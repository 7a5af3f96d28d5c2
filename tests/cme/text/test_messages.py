"""Thoughts of reasoning models: hidden where they end, and without an answer where they don't."""

import pytest

from cme.text.messages import hide_thoughts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("It is 4.", "It is 4."),
        ("", ""),
        ("<think>5?</think>It is 4.", "It is 4."),
        ("<THINKING>\n5?\n</Thinking>\n\nIt is 4.", "It is 4."),
        ("[THINK]5?[/THINK]It is 4.", "It is 4."),
        ("◁think▷5?◁/think▷It is 4.", "It is 4."),
        ("<seed:think>5?</seed:think>It is 4.", "It is 4."),
        ("<reasoning>5?</reasoning><answer>4</answer>", "<answer>4</answer>"),
        ("5? no, 6.\n</think>\n\nIt is 4.", "It is 4."),  # the template opened it
        ("<think>a <think> b</think>It is 4.", "It is 4."),
        ("<think>a </think> b</think>It is 4.", "It is 4."),
        ("<think>a</think>It is 4.<think>b</think>", "It is 4."),
        ("<think>5?</think>", ""),
        ("I think 4 <b>is</b> it.", "I think 4 <b>is</b> it."),
    ],
)
def test_thoughts_are_spaces_and_the_rest_stays_in_its_place(text, shown):
    hidden = hide_thoughts(text)
    assert hidden.strip() == shown
    assert len(hidden) == len(text)
    assert all(new in (old, " ") for new, old in zip(hidden, text, strict=True))


@pytest.mark.parametrize(
    "text",
    ["<think>It is 4.", "It is 4.\n<think>", "It is 4. Use <think> tags.", "<think>a</think>It is 4.<thinking>5?"],
)
def test_open_thoughts_say_nothing_yet(text):
    assert hide_thoughts(text) is None


def test_very_many_tags_take_no_time():
    assert hide_thoughts("a</think>" * 300_000 + "It is 4.").strip() == "It is 4."
