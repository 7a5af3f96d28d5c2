"""Signatures in the parts of a conversation, by which one rendering shows what a template leaves out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cme.text.messages import CALLS, REASONING
from cme.text.thoughts import hide_thoughts

_SIGNATURE = re.compile(r"4739106528(\d{7})")  # digits are the same in capitals, in JSON and in HTML
_UNSIGNED = ("id", "type")  # of a call: templates demand a form of them, and may leave them out


class Signatures:
    """Signs both ends of each content, in an assistant's what follows the thoughts, which templates may leave out;
    each call of a tool; and the reasoning that a message has in a field of its own."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def signed(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as it is, but for signatures in its texts."""
        role, text = message.get("role"), message["content"] or ""
        signed = dict(message)
        if text.strip():
            part = f"the content of a message of role {role!r}"
            start, end = _ends(text, role)
            signed["content"] = text[:start] + self._new(part) + text[start:end] + self._new(part) + text[end:]
        for name in CALLS:
            if calls := message.get(name):
                part = f"{name} of a message of role {role!r}"
                each = calls if isinstance(calls, list | tuple) else [calls]
                new = [_with(call, self._new(part)) for call in each]
                signed[name] = new if each is calls else new[0]
        thoughts = [name for name in REASONING if message.get(name)]
        if thoughts:  # under two names they are the same
            signature = self._new(f"{thoughts[0]} of a message of role {role!r}")
            signed |= {name: _with(message[name], signature) for name in thoughts}
        return signed

    def missing(self, text: str) -> str | None:
        """The first part of which a signature is not in `text`."""
        written = {int(n) for n in _SIGNATURE.findall(text)}
        return next((part for n, part in enumerate(self._parts) if n not in written), None)

    def _new(self, part: str) -> str:
        self._parts.append(part)
        return f"4739106528{len(self._parts) - 1:07}"


def _ends(content: str, role: Any) -> tuple[int, int]:
    """[start, end) of what a message says, without its thoughts and without white space around it."""
    said = content if role != "assistant" else hide_thoughts(content) or ""
    start = len(content) - len(said.lstrip())
    return start, max(start, len(content.rstrip()))


def _with(value: Any, signature: str) -> Any:
    """`value` with a signature at the end of each text in it."""
    if isinstance(value, str):
        return value + signature
    if isinstance(value, Mapping):
        return {k: item if k in _UNSIGNED else _with(item, signature) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with(item, signature) for item in value]
    return value
