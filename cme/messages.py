"""Conversations in the chat format, and the text in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cme.errors import TemplateError

Messages = Sequence[Mapping[str, Any]]
"""A conversation: dicts with "role" and "content", which is a text or a list of parts."""

_BESIDES_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Where messages hold what a model wrote besides their content."""


def text_of(conversation: str | Messages) -> str:
    """The text of a prompt or a response for people to read: as it is, or the contents of its messages, of which
    all that is not text is left out. `scored_text` is the one for a verifier."""
    if isinstance(conversation, str):
        return conversation
    return "\n\n".join(_visible_text(message) for message in conversation)


def scored_text(conversation: str | Messages) -> str:
    """The text of a prompt or a response, all of it.

    Raises TemplateError if it holds anything else, such as an image, a tool call, or reasoning in its own field.
    """
    if isinstance(conversation, str):
        return conversation
    contents = [content_texts(message) or [] for message in conversation]
    for message in conversation:
        besides = [name for name in _BESIDES_CONTENT if message.get(name)]
        if besides:
            raise TemplateError(
                f"a message of role {message.get('role')!r} has {', '.join(besides)} besides its content, which "
                "would not be scored: write it into the content in the form that the verifier reads"
            )
    return "\n\n".join("".join(texts) for texts in contents)


def content_texts(message: Mapping[str, Any]) -> list[str] | None:
    """The texts that a message's content consists of; None if it has no content, as a message of tool calls alone.

    A part is a text if its "text" is one, and its "type" is "text" or missing. Raises TemplateError if the content
    holds anything else.
    """
    if not isinstance(message, Mapping):
        raise TemplateError(f"a message is {_shown(message)}, not a dict with a role and a content")
    content = message.get("content")
    if content is None:
        return None
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise TemplateError(f"the content of a message is {_shown(content)}, neither a text nor a list of parts")
    other = [_kind(part) for part in content if _part_text(part) is None]
    if other:
        raise TemplateError(
            f"a message of role {message.get('role')!r} holds {', '.join(other)}: only text can be scored, in "
            'parts such as {"type": "text", "text": "Hi"}'
        )
    return [str(part["text"]) for part in content]


def split_partial(prompt: Messages) -> tuple[Messages, Mapping[str, Any] | None]:
    """The messages before a response, and the assistant's message that the response goes on with, if the prompt
    ends with one. An empty message there only marks the response's place and is left out."""
    if not prompt or not isinstance(prompt[-1], Mapping) or prompt[-1].get("role") != "assistant":
        return prompt, None
    return prompt[:-1], None if _is_blank(prompt[-1]) else prompt[-1]


def is_continued(prompt: str | Messages) -> bool:
    """Whether a response to `prompt` goes on with its last message."""
    return not isinstance(prompt, str) and split_partial(prompt)[1] is not None


def _visible_text(message: Mapping[str, Any]) -> str:
    return "".join(text or "" for text in _maybe_texts(message))


def _is_blank(message: Mapping[str, Any]) -> bool:
    blank = all(text is not None and not text.strip() for text in _maybe_texts(message))
    return blank and not any(message.get(name) for name in _BESIDES_CONTENT)


def _maybe_texts(message: Mapping[str, Any]) -> list[str | None]:
    """The parts of a message's content, None for what is no text."""
    content = message.get("content") if isinstance(message, Mapping) else message
    if isinstance(content, list | tuple):
        return [_part_text(part) for part in content]
    return [content if isinstance(content, str) else None]


def _part_text(part: Any) -> str | None:
    is_text = isinstance(part, Mapping) and part.get("type") in ("text", None)
    return part["text"] if is_text and isinstance(part.get("text"), str) else None


def _kind(part: Any) -> str:
    named = isinstance(part, Mapping) and part.get("type") not in ("text", None)
    return str(part["type"]) if named else _shown(part)


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
