"""The text that a verifier reads: what a chat template or a plain one writes around a prompt and its response."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from cme.errors import TemplateError
from cme.text.messages import CALLS, Messages, scored_text, split_partial, text_of
from cme.text.signatures import Signatures

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
    """What a template writes around a response.

    Attributes:
        before: from the question to the response, without `space`.
        space: white space between that and the response.
        after: None if the template writes prompts only.
    """

    before: str
    space: str
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
        """The text before the response, less white space. An answer to go on with stands in the response's place.

        Raises TemplateError if the prompt holds more than text, or has no question.
        """
        if isinstance(prompt, str):
            return self._prefix.replace("{prompt}", prompt)
        messages, partial = split_partial(prompt)
        if not messages:
            raise TemplateError("a prompt needs at least one message besides the answer to go on with")
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
        """The text before the response, of a text or of `plain_messages`. An answer to go on with keeps white
        space that the template would trim.

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
        self._wants_parts  # noqa: B018

    @cached_property
    def around(self) -> Around:
        """Raises TemplateError if the template refuses whatever it is tried with."""
        knows_prompts: list[Around] = []
        refusal: TemplateError | None = None
        for probe in _PROBES:
            try:
                around = self._probed(probe)
            except TemplateError as error:
                refusal = refusal or error
                continue
            if around.after is not None:
                return around
            knows_prompts.append(around)
        if not knows_prompts:
            raise TemplateError(f"what the chat template writes around a response can't be found: {refusal}")
        return knows_prompts[0]

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
        """The conversation as the template writes it, all of it.

        Raises TemplateError if the template refuses it, whatever it raises, or leaves a part of it out.
        """
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
        """Which part of a conversation the template doesn't write."""
        signatures = Signatures()
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
