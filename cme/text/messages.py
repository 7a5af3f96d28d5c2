"""Conversations in the chat format: the text of prompts and responses, and which part of it is thoughts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cme.errors import TemplateError

Messages = Sequence[Mapping[str, Any]]
"""A conversation: dicts with "role" and "content", which is a text or a list of parts."""

Conversations = Sequence[str | Messages]
"""Prompts or responses: texts, or conversations."""

CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of messages for text that a model wrote besides the content: its calls of tools, and its thoughts."""

THOUGHT_TAG = re.compile(r"[<◁]/?(?:seed:)?(?:think|thinking|thoughts?|reasoning)[>▷]|\[/?THINK\]", re.IGNORECASE)
"""Tags around thoughts, as reasoning models write them in their text."""


def text_of(conversation: str | Messages) -> str:
    """The text of a prompt or a response for people to read: as it is, or the contents of its messages without
    images and other parts. `scored_text` and `generated_text` are those for a verifier."""
    if isinstance(conversation, str):
        return conversation
    messages = conversation if _is_list(conversation) else ()
    return "\n\n".join("".join(text or "" for text in _part_texts(message)) for message in messages)


def scored_text(messages: Messages) -> str:
    """The contents of messages.

    Raises TemplateError if they hold anything else, such as an image, a tool call, or reasoning in its own field.
    """
    texts = ["".join(content_texts(message) or []) for message in messages]
    for message in messages:
        _refuse_fields(message, (*CALLS, *REASONING))
    return "\n\n".join(texts)


def generated_text(response: str | Messages) -> str:
    """The text of a response as its model wrote it, with reasoning in a field of its own put before the content in
    `<think>` and `</think>`; only the first where thoughts are all there is.

    Raises TemplateError if it is neither a text nor one message, the assistant's, or holds more than text.
    """
    check_conversation("response", response)
    if isinstance(response, str) or not response:
        return str(response or "")
    message = response[0]
    content = "".join(content_texts(message) or [])
    roles = [str(message.get("role")) if isinstance(message, Mapping) else _shown(message) for message in response]
    if roles != ["assistant"]:
        raise TemplateError(
            f"a response is one message of the assistant's, and this one has {', '.join(roles)}: the text of a "
            "tool or a user is not the model's, so it has no score"
        )
    _refuse_fields(message, CALLS)
    thoughts = next((message[name] for name in REASONING if message.get(name)), None)
    if thoughts is None:
        return content
    if not isinstance(thoughts, str):
        raise TemplateError(f"the reasoning of a message is {_shown(thoughts)}, not a text")
    opened = "<think>\n" + thoughts.strip("\n")
    return f"{opened}\n</think>\n\n{content}" if content.strip() else opened


def plain_messages(prompt: Messages) -> list[dict[str, Any]]:
    """The messages with one text, or None, as the content of each, and without keys whose value is null.

    Rows of Parquet have every key at every depth, null where a row of JSON has none, and chat templates ask if
    there is a key, or write "None". Raises TemplateError if a content holds more than text.
    """
    texts = [content_texts(message) for message in prompt]
    return [
        {**_without_nulls(message), "content": None if parts is None else "".join(parts)}
        for message, parts in zip(prompt, texts, strict=True)
    ]


def check_conversation(name: str, value: Any) -> None:
    """Raise TemplateError if `value` is neither a text nor a list, which messages are in."""
    if not isinstance(value, str) and not _is_list(value):
        raise TemplateError(f"the {name} is {_shown(value)}, neither a text nor a list of messages")


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
    texts = [_part_text(part) for part in content]
    other = [_kind(part) for part, text in zip(content, texts, strict=True) if text is None]
    if other:
        raise TemplateError(
            f"a message of role {message.get('role')!r} holds {', '.join(other)}: only text can be scored, in "
            'parts such as {"type": "text", "text": "Hi"}'
        )
    return [text for text in texts if text is not None]


def split_partial(prompt: Messages) -> tuple[Messages, Mapping[str, Any] | None]:
    """The messages before a response, and the assistant's message that the response continues, if the prompt ends
    with one. An empty message there only marks the response's place and is left out."""
    if not prompt or not isinstance(prompt[-1], Mapping) or prompt[-1].get("role") != "assistant":
        return prompt, None
    last = prompt[-1]
    is_blank = all(text is not None and not text.strip() for text in _part_texts(last))
    return prompt[:-1], None if is_blank and not any(map(last.get, (*CALLS, *REASONING))) else last


def is_continued(prompt: str | Messages) -> bool:
    """A response to `prompt` continues its last message."""
    return not isinstance(prompt, str) and split_partial(prompt)[1] is not None


def hide_thoughts(text: str) -> str | None:
    """`text` with a space for each character of its thoughts, tags included: the answer keeps its position.

    A closing tag that nothing opened ends thoughts that began before the text, as where a chat template writes the
    opening tag. None if thoughts are left open, even after an answer, or by a tag that is only mentioned: the
    answer is yet to come, and may take back an earlier one.
    """
    hidden: list[tuple[int, int]] = []
    start, is_open = 0, False
    for tag in THOUGHT_TAG.finditer(text):
        if "/" in tag[0]:
            if not is_open:
                start, hidden = 0, []
            hidden.append((start, tag.end()))
            is_open = False
        elif not is_open:
            start, is_open = tag.start(), True
    if is_open:
        return None
    parts, end = [], 0
    for start, stop in hidden:
        parts += [text[end:start], " " * (stop - start)]
        end = stop
    return "".join([*parts, text[end:]])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _refuse_fields(message: Mapping[str, Any], fields: Sequence[str]) -> None:
    given = [name for name in fields if message.get(name)]
    if given:
        raise TemplateError(
            f"a message of role {message.get('role')!r} has {', '.join(given)} besides its content, which would "
            "not be scored: only text is"
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _part_texts(message: Any) -> list[str | None]:
    """The parts of a message's content, None for one that is no text."""
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
