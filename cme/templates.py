"""The text that a verifier reads: what a chat template or a plain one writes around a prompt and its response."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from cme.errors import TemplateError
from cme.messages import Messages, content_texts, scored_text, split_partial, text_of

PLAIN_TEMPLATE = "Question: {prompt}\nAnswer: {response}"
"""For verifiers without a chat template, which are pretrained models: a form of text they have seen."""

_QUESTION, _ANSWER = "QUESTION-OF-THE-PROBE", "RESPONSE-OF-THE-PROBE"
_ASKED = {"role": "user", "content": _QUESTION}
# Some templates refuse a conversation without instructions, others one with them
_PROBES: tuple[Messages, ...] = (
    [_ASKED],
    [{"role": "system", "content": "Be brief."}, _ASKED],
    [{"role": "developer", "content": "Be brief."}, _ASKED],
)
_REFUSALS = (jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError)


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
        """The text before the response. An answer to go on with keeps white space that the template would trim.

        Raises TemplateError if the template refuses the conversation, or it holds more than text.
        """
        if isinstance(prompt, str):
            return self._apply([{"role": "user", "content": prompt}], add_generation_prompt=True)
        messages, partial = split_partial(prompt)
        if partial is None:
            return self._apply(messages, add_generation_prompt=True)
        text = self._apply([*messages, partial], continue_final_message=True)
        answer = "".join(content_texts(partial) or [])
        space = answer[len(answer.rstrip()) :]
        return text if text.endswith(space) else text + space

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

    def _apply(
        self, messages: Messages, add_generation_prompt: bool = False, continue_final_message: bool = False
    ) -> str:
        if not messages:
            raise TemplateError("a prompt needs at least one message")
        conversation = [self._message(message) for message in messages]
        try:
            return self._written(conversation, add_generation_prompt, continue_final_message)
        except _REFUSALS as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses the prompt "
                f"{text_of(messages)[:80]!r} (roles: {roles}): {error}. Change the conversation, or give a plain "
                f"template such as {PLAIN_TEMPLATE!r}"
            ) from error

    def _written(self, conversation: Any, add_generation_prompt: bool, continue_final_message: bool) -> str:
        how = {
            **self.variables,
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        text = str(self.tokenizer.apply_chat_template(conversation, **how))
        text.encode()  # half of a surrogate pair, in a name say, is refused here and not by the tokenizer
        return text

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its content in the form, string or list of parts, that the template reads."""
        texts = content_texts(message)
        # Rows of Parquet have every key, and templates look whether there is one, or write "None"
        given = {key: value for key, value in message.items() if value is not None or key == "content"}
        if texts is None and not message.get("tool_calls"):
            raise TemplateError(f"a message of role {message.get('role')!r} has no content")
        return given if texts is None else {**given, "content": _in_form(texts, self._wants_parts)}

    @cached_property
    def _wants_parts(self) -> bool:
        # Given the wrong form, a template leaves the content out or writes the list's Python source
        for wants_parts in (False, True):
            for probe in _PROBES:
                messages = [{**m, "content": _in_form([m["content"]], wants_parts)} for m in probe]
                with contextlib.suppress(*_REFUSALS):
                    if _QUESTION in self._written(messages, False, False):
                        return wants_parts
        return False


def _in_form(texts: list[str], parts: bool) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts] if parts else "".join(texts)
