"""Conversation -> (prompt ids, response ids) in the verifier's own template and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from cme.errors import TemplateError

Messages = Sequence[Mapping[str, Any]]
"""A conversation: dicts with "role" and "content"."""

PLAIN_TEMPLATE = "Question: {prompt}\nAnswer: {response}"
"""For verifiers without a chat template, which are pretrained models: a form of text they have seen."""


@dataclass(frozen=True)
class Renderer:
    """Renders in a chat template (`template` is None) or in a plain one, text with {prompt} and {response}.

    A response is tokenised on its own, so that all responses share the tokens of their prompt. White space before
    {response} belongs to the response's first token, which is how it would be tokenised in running text.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> Renderer:
        """`template` is "chat" (the tokenizer's own), text with {prompt} and {response}, or "auto": chat where
        the tokenizer has a chat template, else PLAIN_TEMPLATE. Raises TemplateError if it is none of these."""
        if template == "auto":
            return Renderer(tokenizer, None if tokenizer.chat_template else PLAIN_TEMPLATE)
        if template == "chat":
            if not tokenizer.chat_template:
                raise TemplateError(
                    f"the verifier {tokenizer.name_or_path!r} has no chat template: use template='auto', or give "
                    f"a plain one such as {PLAIN_TEMPLATE!r}"
                )
            return Renderer(tokenizer, None)
        if template.count("{prompt}") != 1 or template.count("{response}") != 1:
            raise TemplateError(f"template {template!r} must contain {{prompt}} and {{response}}, once each")
        if not template.endswith("{response}"):
            raise TemplateError(f"template {template!r} must end with {{response}}: what follows is not scored")
        return Renderer(tokenizer, template)

    def prompt_ids(self, prompt: str | Messages) -> tuple[int, ...]:
        """Tokens before the response, with BOS if the template writes it or, for plain text, if the tokenizer
        adds one."""
        if self.template is not None:
            text = self._plain_prefix.replace("{prompt}", text_of(prompt))
            ids = self.tokenizer(text)["input_ids"]
            return tuple(ids or self._fallback_bos())
        messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def response_ids(self, response: str | Messages) -> tuple[int, ...]:
        """Tokens of the response; none if it is empty or white space."""
        text = text_of(response)
        if not text.strip():
            return ()
        if self._leading_space and not (self._adds_space or text[0].isspace()):
            text = self._leading_space + text
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _plain_prefix(self) -> str:
        assert self.template is not None
        return self.template.removesuffix("{response}").rstrip()

    @cached_property
    def _leading_space(self) -> str:
        if self.template is None:
            return ""
        return self.template.removesuffix("{response}")[len(self._plain_prefix) :]

    @cached_property
    def _adds_space(self) -> bool:
        # SentencePiece tokenizers of the Llama 2 kind put a space before any text by themselves
        return self._leading_space == " " and self.tokenizer.tokenize("a") == ["▁a"]

    def _fallback_bos(self) -> list[int]:
        token = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if token is None else token]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt as a generator gets it: a conversation ends with the generation prompt."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    messages: Any = prompt
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def text_of(conversation: str | Messages) -> str:
    """The text of a prompt or a response: as it is, or the contents of its messages."""
    if isinstance(conversation, str):
        return conversation
    return "\n\n".join(_content(message) for message in conversation)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:  # a message of tool calls alone
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
