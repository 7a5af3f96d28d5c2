"""Conversation -> the text before a response, in a chat template or a plain one. Refused are chat templates that
leave out a part of a conversation, on which the score would not depend."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from cme.errors import TemplateError
from cme.text.messages import CALLS, REASONING, Messages, hide_thoughts, scored_text, split_partial, text_of

PLAIN_TEMPLATE = "Question: {prompt}\nAnswer: {response}"
"""For verifiers without a chat template, which are pretrained models: a form of text they have seen."""

_QUESTION, _ANSWER = "\ufdd1?", "\ufdd1!"  # no other text has them, and templates that change cases leave them
_ASKED = {"role": "user", "content": _QUESTION}
# Some templates refuse a conversation without instructions, others one with them
_PROBES: tuple[Messages, ...] = (
    [_ASKED],
    [{"role": "system", "content": "Be brief."}, _ASKED],
    [{"role": "developer", "content": "Be brief."}, _ASKED],
)


@dataclass(frozen=True)
class Around:
    """The text that a template writes around a response; `after` is None if it writes prompts only."""

    before: str  # from the question to the space
    space: str  # white space before the response
    after: str | None


@dataclass(frozen=True)
class PlainTemplate:
    """A text with {prompt} and, at its end, {response}."""

    text: str

    def __post_init__(self) -> None:
        if self.text.count("{prompt}") != 1 or self.text.count("{response}") != 1:
            raise TemplateError(f"template {self.text!r} must contain {{prompt}} and {{response}}, once each")
        if not self.text.endswith("{response}"):
            raise TemplateError(f"template {self.text!r} must end with {{response}}: what follows is not scored")

    def prompt_text(self, prompt: str | Messages) -> str:
        """The text before the response, less white space. An answer to continue stands in the response's place.

        Raises TemplateError if the prompt holds more than text, or has no question.
        """
        if isinstance(prompt, str):
            return self._prefix.replace("{prompt}", prompt)
        messages, partial = split_partial(prompt)
        if not messages:
            raise TemplateError("a prompt needs at least one message besides the answer to continue")
        before = self._prefix.replace("{prompt}", scored_text(messages))
        if partial is None:
            return before
        answer = scored_text([partial])
        return before + ("" if answer[:1].isspace() else self.around.space) + answer

    @cached_property
    def around(self) -> Around:
        space = self.text.removesuffix("{response}")[len(self._prefix) :]
        return Around(self._prefix.rpartition("{prompt}")[2], space, None)

    @cached_property
    def _prefix(self) -> str:
        return self.text.removesuffix("{response}").rstrip()


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's own template, and values of its variables."""

    tokenizer: PreTrainedTokenizerBase
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def prompt_text(self, prompt: str | Messages) -> str:
        """The text before the response, of a text or of `plain_messages`. An answer to continue keeps white space
        that the template would trim.

        Raises TemplateError if the template refuses the conversation or leaves a part of it out.
        """
        if isinstance(prompt, str):
            return self._apply([{"role": "user", "content": prompt}], add_generation_prompt=True)
        messages, partial = split_partial(prompt)
        if partial is None:
            return self._apply(messages, add_generation_prompt=True)
        text = self._apply([*messages, partial], continue_final_message=True)
        answer = partial["content"] or ""
        space = answer[len(answer.rstrip()) :]
        return text if text.endswith(space) else text + space

    def check(self) -> None:
        """Raise TemplateError if the template writes the same whatever is asked."""
        self._wants_parts  # noqa: B018  # it raises

    @cached_property
    def around(self) -> Around:
        """Raises TemplateError if the template refuses whatever it is tried with."""
        found: list[Around] = []
        refusals: list[TemplateError] = []
        for probe in _PROBES:
            try:
                found.append(self._probed(probe))
            except TemplateError as error:
                refusals.append(error)
        if not found:
            raise TemplateError(f"the text around a response can't be found: {refusals[0]}")
        return next((around for around in found if around.after is not None), found[0])

    def _probed(self, probe: Messages) -> Around:
        prompt = self._apply(probe, add_generation_prompt=True)
        before = prompt.rpartition(_QUESTION)[2]
        try:
            whole = self._apply([*probe, {"role": "assistant", "content": _ANSWER}])
        except TemplateError:
            return Around(before, "", None)
        start, answer, after = whole.rpartition(_ANSWER)
        between = start.removeprefix(prompt) if start.startswith(prompt) else ""
        return Around(before, between if between.isspace() else "", after if answer else None)

    def _apply(self, messages: Messages, **how: bool) -> str:
        """The whole conversation as the template writes it. Raises TemplateError if it refuses or leaves out a
        part."""
        if not messages:
            raise TemplateError("a prompt needs at least one message")
        for message in messages:
            if message["content"] is None and not any(message.get(name) for name in CALLS):
                raise TemplateError(f"a message of role {message.get('role')!r} has no content")
        try:
            text = self._written(messages, **how)
        except Exception as error:  # a template is a program, and not ours
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses the prompt "
                f"{text_of(messages)[:80]!r} (roles: {roles}): {type(error).__name__}: {error}. "
                f"Change the conversation, or give a plain template such as {PLAIN_TEMPLATE!r}"
            ) from error
        left_out = self._left_out(messages, how)
        if left_out is not None:
            raise TemplateError(
                f"the chat template of {self.tokenizer.name_or_path!r} leaves out {left_out}, on which the score "
                "would not depend: leave it out of the prompt, or put its text where the template reads it"
            )
        return text

    def _left_out(self, messages: Messages, how: Mapping[str, bool]) -> str | None:
        """The first part of a conversation that the template doesn't write."""
        signatures = _Signatures()
        signed = [signatures.signed(message) for message in messages]
        try:
            return signatures.missing(self._written(signed, **how))
        except Exception:
            return None  # it reads what it stumbles over

    def _written(self, messages: Messages, as_parts: bool | None = None, **how: bool) -> str:
        as_parts = self._wants_parts if as_parts is None else as_parts
        conversation: Any = [_as_parts(message) for message in messages] if as_parts else messages
        how = {"tokenize": False, "add_generation_prompt": False, "continue_final_message": False, **how}
        text = str(self.tokenizer.apply_chat_template(conversation, **{**self.variables, **how}))
        text.encode()  # half of a surrogate pair, in a name say, is refused here and not by the tokenizer
        return text

    @cached_property
    def _wants_parts(self) -> bool:
        # Given the wrong form, a template leaves the content out or writes the list's Python source
        was_written = False
        for as_parts in (False, True):
            for probe in _PROBES:
                with contextlib.suppress(Exception):
                    if _QUESTION in self._written(probe, as_parts):
                        return as_parts
                    was_written = True
        if was_written:
            raise TemplateError(
                f"the chat template of {self.tokenizer.name_or_path!r} leaves out what is asked, so that no score "
                f"would depend on it: use another, or a plain one such as {PLAIN_TEMPLATE!r}"
            )
        return False


def _as_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    text = message["content"]
    return {**message, "content": None if text is None else [{"type": "text", "text": text}]}


_CODES = [f"%{code}" for code in "aAbBcCdDefFgGhHIjmMnprRStTuUVwWxXyYzZ%"] + [f"%-{code}" for code in "dmyHIMSj"]
"""Codes in formats of time: Python's and the C standard's, and glibc's numbers without leading zeros."""


def standing_at(now: datetime, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Arguments for `tokenizer.apply_chat_template` with which its template takes `now` for the present; none if
    it does not ask for the time.

    transformers gives templates the function `strftime_now`, and no function as an argument. A macro of that name
    hides it.
    """
    found = tokenizer.chat_template
    template = found.get("default") if isinstance(found, dict) else found
    if template is None or "strftime_now" not in template:
        return {}
    filters = "".join(f"|replace({json.dumps(code)}, {json.dumps(now.strftime(code))})" for code in _CODES)
    # transformers drops the line break, after which the template's first tag stands at the start of a line
    return {
        "chat_template": f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
    }


_SIGNATURE = re.compile(r"4739106528(\d{7})")  # digits are the same in capitals, in JSON and in HTML
_UNSIGNED = ("id", "type")  # of a call: templates demand a form of them, and may leave them out


class _Signatures:
    """Numbers put into the parts of a conversation: those that a rendering lacks are of parts that are left out.

    Signed are both ends of each content, of an assistant's without the thoughts, which templates may leave out;
    each call of a tool; and the reasoning that a message has in a field of its own.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []

    def signed(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with signatures in its texts."""
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
    """[start, end) of a content without its thoughts and without white space around it."""
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
