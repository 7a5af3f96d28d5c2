"""Control tokens such as `<|im_end|>`: a template writes them, and a message that spells one holds its text.

The tags of thoughts are none of them: models write these, and templates look for them in what was written.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from cme.errors import TemplateError
from cme.text.thoughts import TAG

Span = tuple[int, int]
"""[start, end) of a token in a text, in characters."""

_MARK = "\ufdd0"  # a noncharacter, which Unicode keeps for uses like this one


class ControlTokens:
    """Tells the control tokens that a text spells, which `quoted` marks, from those that a template writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
        self._tokens = {
            i: token
            for i, token in added.items()
            if (token.special or i in special) and token.content and not TAG.fullmatch(token.content)
        }
        self._ids = {token.content: id_ for id_, token in self._tokens.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        spelled = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._spelled = re.compile(spelled)
        self._marked_or_spelled = re.compile(f"{_MARK}(\\d+){_MARK}|{spelled}")

    def quoted(self, value: Any) -> Any:
        """`value`, a text or a conversation, with marks for the control tokens that its texts spell.

        Raises TemplateError if a text holds U+FDD0, which is the mark.
        """
        if isinstance(value, str):
            if _MARK in value:
                raise TemplateError("a text holds U+FDD0, which is no character: leave it out")
            return self._spelled.sub(lambda match: _name(self._ids[match[0]]), value)
        if isinstance(value, Mapping):
            return {self.quoted(key): self.quoted(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.quoted(item) for item in value]
        return value

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Tokens of a text: what is marked is text, and the rest is read as ever.

        Raises TemplateError if the tokenizer can't read a control token as text.
        """
        if _MARK not in text:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        if not self._tokenizer.is_fast:
            raise TemplateError(
                f"a text spells a control token, and {type(self._tokenizer).__name__} can't read it as text: "
                "that needs a fast tokenizer (tokenizer.json)"
            )
        ids, _ = self._reader.read(self.renamed(text), add_special_tokens)
        return ids

    def renamed(self, text: str) -> str:
        """A text as a `Reader` takes it: control tokens by their other names, marked ones as they are spelled."""
        return self._marked_or_spelled.sub(
            lambda match: self._tokens[int(match[1])].content if match[1] else _name(self._ids[match[0]]), text
        )

    def reader(self) -> Reader:
        """A new one. The tokenizer must be a fast one."""
        return Reader(self._tokenizer, self._tokens)

    @cached_property
    def _reader(self) -> Reader:
        return self.reader()


class Reader:
    """A copy of a fast tokenizer, `backend`, that knows control tokens by names that no text has, so that their
    own are text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Mapping[int, AddedToken]) -> None:
        self.backend: Tokenizer = _copy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        names = {_name(id_): token for id_, token in tokens.items()}
        self.backend.add_tokens(
            [AddedToken(name, normalized=False, lstrip=t.lstrip, rstrip=t.rstrip) for name, t in names.items()]
        )
        self._own = {self.backend.token_to_id(_name(id_)): id_ for id_ in tokens}
        # Unknown characters are text, and padding may be any token
        may_be_text = {tokenizer.unk_token_id, tokenizer.pad_token_id}
        self._never_text = tokens.keys() - (may_be_text - {tokenizer.bos_token_id, tokenizer.eos_token_id})

    def read(self, text: str, add_special_tokens: bool = False) -> tuple[list[int], list[Span]]:
        """The tokenizer's ids of a `renamed` text, and their places in it.

        Raises TemplateError if the tokenizer makes a control token of text: Unigram models have some as pieces.
        """
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        if not add_special_tokens and not self._never_text.isdisjoint(encoding.ids):
            raise TemplateError(
                "a text spells a control token, which this tokenizer can't read as text: leave it out"
            )
        return [self._own.get(id_, id_) for id_ in encoding.ids], encoding.offsets


def _copy(backend: Tokenizer) -> Tokenizer:
    """A copy in which tags of thoughts are not special, so that they stay tokens where special ones are text."""
    if not any(TAG.fullmatch(token.content) for token in backend.get_added_tokens_decoder().values()):
        return copy.deepcopy(backend)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] &= not TAG.fullmatch(token["content"])
    return Tokenizer.from_str(json.dumps(state))


def _name(id_: int) -> str:
    return f"{_MARK}{id_}{_MARK}"
