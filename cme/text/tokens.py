"""Text -> token ids, and ids -> where each token lies in the text.

Control tokens are those such as `<|im_end|>` that a template writes; a message that spells one holds its text.
Tags of thoughts are none: models write them, and templates look for them in the messages.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from cme.errors import ModelError, TemplateError
from cme.text.messages import THOUGHT_TAG

Span = tuple[int, int]
"""[start, end) of a token in a text, in characters."""

_MARK = "\ufdd0"  # a noncharacter, which Unicode keeps for uses like this one
_ANCHORS = ("\n", ".", "a", "0")
"""Texts in the place of an unknown one before another: a tokenizer may join one of them to it, but hardly all."""


class Encoder:
    """Tokenises the pieces of a text, so that together they have the tokens of the whole, or nearly so: no token
    reaches over the boundary of two pieces.

    Control tokens that a message spells, which `quoted` marks, are text, unlike those that a template writes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
        self._tokens = {
            i: token
            for i, token in added.items()
            if (token.special or i in special) and token.content and not THOUGHT_TAG.fullmatch(token.content)
        }
        self._ids = {token.content: id_ for id_, token in self._tokens.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        spelled = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._spelled = re.compile(spelled)
        self._marked_or_spelled = re.compile(f"{_MARK}(\\d+){_MARK}|{spelled}")
        self._anchor_ids: dict[str, list[int]] = {}

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
        """Tokens of a text, in which marked control tokens are text.

        Raises TemplateError if the tokenizer can't read a control token as text.
        """
        if _MARK not in text:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        if not self.tokenizer.is_fast:
            raise TemplateError(
                f"a text spells a control token, and {type(self.tokenizer).__name__} can't read it as text: "
                "that needs a fast tokenizer (tokenizer.json)"
            )
        ids, _ = self._reader.read(self.renamed(text), add_special_tokens)
        return ids

    def beginning(self, text: str) -> list[int]:
        """Tokens of a text from its beginning, with those that the tokenizer puts before a text, but without those
        that it puts after one."""
        ids = self.encode(text)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] == [bos]:
            return ids
        if not ids:
            return [i for i in (bos, self.tokenizer.eos_token_id) if i is not None][:1]
        marked = self.encode(text, add_special_tokens=True)
        for start in range(len(marked) - len(ids) + 1):
            if marked[start : start + len(ids)] == ids:
                return marked[: start + len(ids)]
        return marked

    def continuation(self, text: str, before: str = "") -> list[int]:
        """Tokens of a text that continues another, whose end is `before` if that is known.

        Raises TemplateError if the tokenizer adds a space to a text that stands alone, and joins this one to
        whatever it is put after.
        """
        for anchor in self.anchors(before):
            ids = self._after(anchor, text)
            if ids is not None:
                return ids
        raise TemplateError(
            f"the tokenizer of {self.tokenizer.name_or_path!r} joins the beginning of {text[:40]!r} to whatever "
            "it continues, so it has no tokens of its own"
        )

    def anchors(self, before: str) -> list[str]:
        """Texts to put before another to find the tokens that it has in the midst of a text, best first."""
        anchors = (before, *_ANCHORS) if self._adds_space else (before, "")
        return [anchor for anchor in dict.fromkeys(anchors) if anchor or not self._adds_space]

    def _after(self, anchor: str, text: str) -> list[int] | None:
        if not anchor:
            return self.encode(text)
        if anchor not in self._anchor_ids:
            self._anchor_ids[anchor] = self.encode(anchor)
        start, whole = self._anchor_ids[anchor], self.encode(anchor + text)
        # Unknown characters in a row may be one token, which then holds some of the text
        is_apart = start and start[-1] != self.tokenizer.unk_token_id and whole[: len(start)] == start
        return whole[len(start) :] if is_apart else None

    @cached_property
    def _adds_space(self) -> bool:
        # SentencePiece tokenizers of the Llama 2 kind put a space before any text, and some byte-level ones do
        return "".join(self.tokenizer.tokenize("a")).startswith(("▁", "Ġ"))

    def renamed(self, text: str) -> str:
        """A text for a `Reader`: control tokens by their other names, marked ones as they are spelled."""
        return self._marked_or_spelled.sub(
            lambda match: self._tokens[int(match[1])].content if match[1] else _name(self._ids[match[0]]), text
        )

    def reader(self) -> Reader:
        """A new one. The tokenizer must be a fast one."""
        return Reader(self.tokenizer, self._tokens)

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
    if not any(THOUGHT_TAG.fullmatch(token.content) for token in backend.get_added_tokens_decoder().values()):
        return copy.deepcopy(backend)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] &= not THOUGHT_TAG.fullmatch(token["content"])
    return Tokenizer.from_str(json.dumps(state))


def _name(id_: int) -> str:
    return f"{_MARK}{id_}{_MARK}"


@dataclass(frozen=True)
class Alignment:
    """Where a response's tokens lie in its text.

    Attributes:
        text: the response.
        pieces: the text that each token decodes to on its own.
        spans: [start, end) of each token in `text`, in characters.
    """

    text: str
    pieces: tuple[str, ...]
    spans: tuple[Span, ...]

    def select(self, index: Sequence[int]) -> Alignment:
        """The same text with some of its tokens."""
        return Alignment(self.text, tuple(self.pieces[i] for i in index), tuple(self.spans[i] for i in index))


class Aligner:
    """Finds the characters of each token with the offsets of a fast tokenizer.

    A token that is a part of a character (of its bytes) gets the whole character.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Raises ModelError if the tokenizer is not a fast one."""
        tokenizer = encoder.tokenizer
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not say where its tokens lie in the text: scores of "
                "tokens and of spans need a fast tokenizer (tokenizer.json)"
            )
        self._encoder = encoder
        self._reader = encoder.reader()
        # Byte-level tokenizers may leave white space out of their offsets, which only their post-processor does
        self._reader.backend.post_processor = processors.ByteLevel(trim_offsets=False)

    def align(self, text: str, token_ids: Sequence[int], contexts: Iterable[str]) -> Alignment:
        """The characters of `token_ids`, which are those of `text` after one of `contexts` (`Renderer.contexts`).
        Tokens that follow the text, which end the turn, get an empty span at its end.

        Raises ModelError if they are no tokens of `text`.
        """
        for context in contexts:
            before = self._encoder.renamed(context)
            ids, offsets = self._reader.read(before + text)
            # Tokens of the context are none of the response's, unless they reach into it
            outside = sum(end <= len(before) for _, end in offsets)
            for skip in range(outside + 1):
                n = len(ids) - skip
                if n and ids[skip:] == list(token_ids[:n]):
                    spans = [tuple(max(edge - len(before), 0) for edge in span) for span in offsets[skip:]]
                    return self._alignment(text, token_ids, spans)
        raise ModelError(f"the tokens of the response {text[:80]!r} can't be found in its text")

    def _alignment(self, text: str, token_ids: Sequence[int], spans: list[tuple[int, ...]]) -> Alignment:
        pieces = tuple(str(self._encoder.tokenizer.decode([i])) for i in token_ids)
        spans += [(len(text), len(text))] * (len(token_ids) - len(spans))
        # A space that the tokenizer added by itself is given the character that it was put before
        is_added = [not piece.strip() and text[a:b].strip() for piece, (a, b) in zip(pieces, spans, strict=True)]
        found = [(a, a) if added else (a, b) for added, (a, b) in zip(is_added, spans, strict=True)]
        return Alignment(text, pieces, tuple(found))
