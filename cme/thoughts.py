"""Which part of a model's text are its thoughts, as reasoning models mark them: `<think>…</think>` and such."""

from __future__ import annotations

import re

_TAG = re.compile(r"[<◁]/?(?:seed:)?(?:think|thinking|thoughts?|reasoning)[>▷]|\[/?THINK\]", re.IGNORECASE)


def hide_thoughts(text: str) -> str | None:
    """`text` with a space for each character of its thoughts, tags included: what is left keeps its position.

    A closing tag that nothing opened ends thoughts that began before the text, as where a chat template writes the
    opening tag. None if thoughts are left open: what the model has to say is yet to come.
    """
    start, is_open = 0, False
    for tag in _TAG.finditer(text):
        if "/" in tag[0]:
            text = text[:start] + " " * (tag.end() - start) + text[tag.end() :]
            start, is_open = 0, False
        elif not is_open:
            start, is_open = tag.start(), True
    return None if is_open else text
