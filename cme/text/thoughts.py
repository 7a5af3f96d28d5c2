"""Which part of a model's text are its thoughts, as reasoning models mark them: `<think>…</think>` and such."""

from __future__ import annotations

import re

TAG = re.compile(r"[<◁]/?(?:seed:)?(?:think|thinking|thoughts?|reasoning)[>▷]|\[/?THINK\]", re.IGNORECASE)


def hide_thoughts(text: str) -> str | None:
    """`text` with a space for each character of its thoughts, tags included: what is left keeps its position.

    A closing tag that nothing opened ends thoughts that began before the text, as where a chat template writes the
    opening tag. None if thoughts are left open, even after an answer, or by a tag that is only mentioned: what
    the model has to say is yet to come, and may take back what it said.
    """
    hidden: list[tuple[int, int]] = []
    start, is_open = 0, False
    for tag in TAG.finditer(text):
        if "/" in tag[0]:
            if not is_open:
                start, hidden = 0, []
            hidden.append((start, tag.end()))
            is_open = False
        elif not is_open:
            start, is_open = tag.start(), True
    return None if is_open else _spaced(text, hidden)


def _spaced(text: str, spans: list[tuple[int, int]]) -> str:
    parts, end = [], 0
    for start, stop in spans:
        parts += [text[end:start], " " * (stop - start)]
        end = stop
    return "".join([*parts, text[end:]])
