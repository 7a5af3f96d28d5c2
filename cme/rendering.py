"""Conversation -> (prompt ids, response ids) in the verifier's own template and tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from cme.errors import TemplateError

Messages = Sequence[Mapping[str, Any]]
"""A conversation: dicts with "role" and "content"."""

PLAIN_TEMPLATE = "Question: {prompt}\nAnswer: {response}"
"""For verifiers without a chat template, which are pretrained models: a form of text they have seen."""


_MARKER = "RESPONSE-OF-THE-PROBE"
_PROBE = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Renderer:
    """Renders in a chat template (`template` is None) or in a plain one, text with {prompt} and {response}.

    A prompt and its response are tokenised apart: all responses share the tokens of their prompt, and no token
    reaches over the boundary. White space that the template writes there belongs to the response's first token,
    which is how running text is tokenised. A response is otherwise taken as it is, also where the template trims
    the messages of a conversation.

    Attributes:
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}, with which the
            templates of Qwen3 and others put an empty reasoning block before the response.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Renderer:
        """`template` is "chat" (the tokenizer's own), text with {prompt} and {response}, or "auto": chat where
        the tokenizer has a chat template, else PLAIN_TEMPLATE. Raises TemplateError if it is none of these."""
        if template == "auto":
            template = "chat" if tokenizer.chat_template else PLAIN_TEMPLATE
        if template == "chat":
            if not tokenizer.chat_template:
                raise TemplateError(
                    f"the verifier {tokenizer.name_or_path!r} has no chat template: use template='auto', or give "
                    f"a plain one such as {PLAIN_TEMPLATE!r}"
                )
            return Renderer(tokenizer, None, dict(chat_template_kwargs or {}))
        if template.count("{prompt}") != 1 or template.count("{response}") != 1:
            raise TemplateError(f"template {template!r} must contain {{prompt}} and {{response}}, once each")
        if not template.endswith("{response}"):
            raise TemplateError(f"template {template!r} must end with {{response}}: what follows is not scored")
        return Renderer(tokenizer, template)

    def prompt_ids(self, prompt: str | Messages) -> tuple[int, ...]:
        """Tokens before the response, with BOS if the template writes it or, for plain text, if the tokenizer
        adds one. A conversation that ends with an assistant's message is one that the response goes on with.

        Raises TemplateError if the chat template refuses the conversation, or it holds more than text.
        """
        if self.template is not None:
            return tuple(self._with_bos(self._plain_prefix.replace("{prompt}", text_of(prompt))))
        messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not messages:
            raise TemplateError("a prompt needs at least one message")
        continued = messages[-1].get("role") == "assistant"
        text = self._apply(messages, add_generation_prompt=not continued, continue_final_message=continued)
        return tuple(self._encode(text))

    def response_ids(self, response: str | Messages) -> tuple[int, ...]:
        """Tokens of the response; none if it is empty or white space."""
        text = text_of(response)
        if not text.strip():
            return ()
        return tuple(self._continuation(text if text[0].isspace() else self.leading_space + text))

    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: in a chat what the template writes after it, up to the first special token;
        in plain text, and where the template writes no special token, EOS.

        Raises TemplateError if there is no EOS either.
        """
        if self.template is None:
            after = self._apply([*_PROBE, {"role": "assistant", "content": _MARKER}]).rpartition(_MARKER)[2]
            ids = self._encode(after)
            special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            for n, token in enumerate(ids, start=1):
                if token in special:
                    return tuple(ids[:n])
        if self.tokenizer.eos_token_id is None:
            raise TemplateError(f"the tokenizer of {self.tokenizer.name_or_path!r} has no token that ends a turn")
        return (self.tokenizer.eos_token_id,)

    @cached_property
    def leading_space(self) -> str:
        """White space that the template writes between a prompt and its response."""
        if self.template is not None:
            return self.template.removesuffix("{response}")[len(self._plain_prefix) :]
        prompt = self._apply(_PROBE, add_generation_prompt=True)
        try:
            conversation = self._apply([*_PROBE, {"role": "assistant", "content": _MARKER}])
        except TemplateError:  # it knows prompts only
            return ""
        before = conversation.partition(_MARKER)[0]
        between = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return between if between.isspace() else ""

    @cached_property
    def _plain_prefix(self) -> str:
        assert self.template is not None
        return self.template.removesuffix("{response}").rstrip()

    def _apply(self, messages: Messages, **how: Any) -> str:
        conversation: Any = [self._text_message(message) for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation, tokenize=False, **{**self.chat_template_kwargs, **how}
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses the prompt "
                f"{text_of(messages)[:80]!r} (roles: {roles}): {error}. Change the conversation, or give a plain "
                f"template such as {PLAIN_TEMPLATE!r}"
            ) from error

    def _text_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its content in the form, string or list of parts, that the template reads."""
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": _as_parts(content)} if self._wants_parts else dict(message)
        if content is None and message.get("tool_calls"):
            return dict(message)
        if content is None:  # templates write "None", or nothing
            raise TemplateError(f"a message of role {message.get('role')!r} has no content")
        other = {part.get("type") for part in content} - {"text"}
        if other:
            raise TemplateError(f"a message holds {', '.join(map(str, other))}: only text can be scored")
        return dict(message) if self._wants_parts else {**message, "content": _content(message)}

    @cached_property
    def _wants_parts(self) -> bool:
        # Given the wrong form, a template leaves the content out or writes the list's Python source
        for content, wants_parts in ((_MARKER, False), (_as_parts(_MARKER), True)):
            probe: Any = [{"role": "user", "content": content}]
            with contextlib.suppress(jinja2.TemplateError, TypeError):
                text = self.tokenizer.apply_chat_template(probe, tokenize=False, **self.chat_template_kwargs)
                if _MARKER in str(text):
                    return wants_parts
        return False

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_bos(self, text: str) -> list[int]:
        """Tokens of a text from its beginning, with what the tokenizer puts before a text, not with what it puts
        after one."""
        ids = self._encode(text)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] == [bos]:
            return ids
        if not ids:
            return [self.tokenizer.eos_token_id if bos is None else bos]
        marked = list(self.tokenizer(text)["input_ids"])
        for start in range(len(marked) - len(ids) + 1):
            if marked[start : start + len(ids)] == ids:
                return marked[: start + len(ids)]
        return marked

    def _continuation(self, text: str) -> list[int]:
        """Tokens of a text that goes on from another."""
        if not self._adds_space:
            return self._encode(text)
        if text[0] == " ":
            return self._encode(text[1:])
        line = self._encode("\n")
        ids = self._encode("\n" + text)
        return ids[len(line) :] if ids[: len(line)] == line else self._encode(text)

    @cached_property
    def _adds_space(self) -> bool:
        # SentencePiece tokenizers of the Llama 2 kind put a space before any text by themselves
        return "".join(self.tokenizer.tokenize("a")).startswith("▁")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt as a generator gets it: a conversation ends with the generation prompt."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    messages: Any = prompt
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def unescaped(template: str) -> str:
    r"""A template from a command line or the environment, where a line break is written \n and a tab \t."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


def text_of(conversation: str | Messages) -> str:
    """The text of a prompt or a response: as it is, or the contents of its messages."""
    if isinstance(conversation, str):
        return conversation
    return "\n\n".join(_content(message) for message in conversation)


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:  # a message of tool calls alone
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
