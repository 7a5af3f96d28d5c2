"""Conversation -> (prompt ids, response ids) in the verifier's own template and tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from cme.errors import TemplateError
from cme.text.messages import (
    Messages,
    check_conversation,
    generated_text,
    hide_thoughts,
    plain_messages,
    split_partial,
)
from cme.text.templates import PLAIN_TEMPLATE, ChatTemplate, PlainTemplate, standing_at
from cme.text.tokens import Encoder


@dataclass(frozen=True)
class Renderer:
    """Renders in a chat template (`template` is None) or in a plain one, text with {prompt} and {response}.

    A prompt and its response are tokenised apart: all responses share the tokens of their prompt, and no token
    reaches over the boundary. White space that the template writes there belongs to the response's first token,
    which is how running text is tokenised. A response is otherwise taken as it is, also where the template trims
    the messages of a conversation. Control tokens that messages spell are text.

    A response to a prompt that ends with an assistant's message continues it from its last character: no white
    space comes in between, and a plain template has that message where it has the response.

    Attributes:
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}, with which the
            templates of Qwen3 and others put an empty reasoning block before the response.
        score_thoughts: responses are taken as they were written, thoughts included; if False, only the answer that
            follows the thoughts.
        now: the date and time that chat templates are told, which are the same for all texts.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    score_thoughts: bool = True
    now: datetime = field(default_factory=datetime.now, compare=False)

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        score_thoughts: bool = True,
    ) -> Renderer:
        """A renderer in the template "chat" (the tokenizer's own), in a text with {prompt} and {response}, or in
        "auto": chat where the tokenizer has a chat template, else PLAIN_TEMPLATE.

        Raises TemplateError if it is none of these, plain with variables of a chat template, or a chat template
        that writes the same whatever is asked.
        """
        if template == "auto":
            template = "chat" if tokenizer.chat_template else PLAIN_TEMPLATE
        if template == "chat":
            if not tokenizer.chat_template:
                raise TemplateError(
                    f"the verifier {tokenizer.name_or_path!r} has no chat template: use template='auto', or give "
                    f"a plain one such as {PLAIN_TEMPLATE!r}"
                )
            variables = dict(chat_template_kwargs or {})
            ChatTemplate(tokenizer, variables).check()
            return Renderer(tokenizer, None, variables, score_thoughts)
        plain = PlainTemplate(template)
        if chat_template_kwargs:
            raise TemplateError(
                f"the plain template {template!r} has no variables: leave out chat_template_kwargs "
                f"{dict(chat_template_kwargs)}, or use template='chat' with a verifier that has one"
            )
        return Renderer(tokenizer, plain.text, score_thoughts=score_thoughts)

    def prompt_ids(self, prompt: str | Messages) -> tuple[int, ...]:
        """Tokens before the response, with BOS if the template writes it or, for plain text, if the tokenizer
        adds one.

        Raises TemplateError if the prompt holds anything but text, or if the chat template refuses it or leaves a
        part of it out.
        """
        check_conversation("prompt", prompt)
        said = prompt if isinstance(prompt, str) else plain_messages(prompt)
        text = self._template.prompt_text(self.encoder.quoted(said))
        return tuple(self.encoder.encode(text) if self.template is None else self.encoder.beginning(text))

    def response_text(self, response: str | Messages) -> str:
        """The text of a response that is scored.

        Raises TemplateError if it is more than one message or holds anything but text, or if thoughts, which are
        not scored, are all there is.
        """
        text = generated_text(response)
        answer = text if self.score_thoughts else hide_thoughts(text)
        if answer is None:
            raise TemplateError(
                "the response ends in its thoughts, and only what follows them is scored: let responses be longer "
                "(--max-completion-length in training), or have thoughts scored, too (score_thoughts)"
            )
        return text if answer == text else answer.strip()

    def response_ids(self, response: str | Messages, *, continued: bool = False) -> tuple[int, ...]:
        """Tokens of the response; none if it is empty or white space.

        Args:
            continued: the response continues its prompt's last message, as `is_continued` tells.

        Raises:
            TemplateError: the response has no text to score, or the tokens that it begins with can't be found.
        """
        text = self.response_text(response)
        if not text.strip():
            return ()
        space, before = self._space_and_before(text, continued)
        return tuple(self.encoder.continuation(space + self.encoder.quoted(text), before))

    def contexts(self, response: str, *, continued: bool = False) -> list[str]:
        """Texts to put before the response, of which one shows its tokens as they are in the midst of a text.
        White space at their ends may be in the response's first token."""
        space, before = self._space_and_before(response, continued)
        return [anchor + space for anchor in self.encoder.anchors(before)]

    def identity(self) -> dict[str, Any]:
        """Everything besides the tokenizer that decides how text becomes tokens, as JSON has it."""
        end: list[int] | None = None
        space: str | None = None
        with contextlib.suppress(TemplateError):
            end = list(self.end_of_turn_ids)
        with contextlib.suppress(TemplateError):
            space = self._template.around.space
        return {
            "kind": "chat" if self.template is None else "plain",
            "template": self.tokenizer.chat_template if self.template is None else self.template,
            "chat_template_kwargs": json.loads(json.dumps(dict(self.chat_template_kwargs), default=str)),
            "end_of_turn_ids": end,
            "leading_space": space,
            "score_thoughts": self.score_thoughts,
        }

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def _space_and_before(self, response: str, continued: bool) -> tuple[str, str]:
        """White space to put before a response, and the template's text before that; empty where a response keeps
        its own white space, which special tokens before it may take."""
        if continued or response[:1].isspace():
            return "", ""
        return self._template.around.space, self._template.around.before

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: in a chat those that the template writes after it, up to the first special
        token; in plain text, and where the template writes no special token or knows prompts only, EOS.

        White space before the special token is a part of the end: in Llama 2's `{response} </s>` a turn ends with
        two tokens, the space and </s>. Raises TemplateError if there is no EOS either.
        """
        after = self._template.around.after
        ids = self.encoder.continuation(after) if after else []
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        for n, token in enumerate(ids, start=1):
            if token in special:
                return tuple(ids[:n])
        if self.tokenizer.eos_token_id is None:
            raise TemplateError(f"the tokenizer of {self.tokenizer.name_or_path!r} has no token that ends a turn")
        return (self.tokenizer.eos_token_id,)

    @cached_property
    def _template(self) -> ChatTemplate | PlainTemplate:
        if self.template is None:
            return ChatTemplate(
                self.tokenizer, {**standing_at(self.now, self.tokenizer), **self.chat_template_kwargs}
            )
        return PlainTemplate(self.template)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt as a generator gets it: a conversation, in the chat template with these variables,
    ends with the generation prompt, or with the beginning of an answer to continue."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    before, partial = split_partial(prompt)
    messages: Any = before if partial is None else [*before, partial]
    return list(
        tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=partial is None,
            continue_final_message=partial is not None,
            tokenize=True,
            return_dict=False,
            **(chat_template_kwargs or {}),
        )
    )
