"""Text -> tokens, at the beginning of a text and in its midst."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from cme.errors import TemplateError
from cme.text.control_tokens import ControlTokens

_ANCHORS = ("\n", ".", "a", "0")
"""What stands for an unknown text before another: a tokenizer may join one of them to it, but hardly all."""


@dataclass(frozen=True)
class Encoder:
    """Tokenises the pieces of a text, so that together they have the tokens of the whole, or nearly so: no token
    reaches over the boundary of two pieces. Control tokens that are quoted in a text are text."""

    tokenizer: PreTrainedTokenizerBase
    control: ControlTokens
    _anchor_ids: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that has all of its special tokens in it."""
        return self.control.encode(text)

    def beginning(self, text: str) -> list[int]:
        """Tokens of a text from its beginning, with what the tokenizer puts before a text, not with what it puts
        after one."""
        ids = self.encode(text)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] == [bos]:
            return ids
        if not ids:
            return [i for i in (bos, self.tokenizer.eos_token_id) if i is not None][:1]
        marked = self.control.encode(text, add_special_tokens=True)
        for start in range(len(marked) - len(ids) + 1):
            if marked[start : start + len(ids)] == ids:
                return marked[: start + len(ids)]
        return marked

    def continuation(self, text: str, before: str = "") -> list[int]:
        """Tokens of a text that goes on from another, whose end is `before` if that is known.

        Raises TemplateError if the tokenizer adds a space to a text that stands alone, and joins this one to
        whatever it is put after.
        """
        for anchor in self.anchors(before):
            ids = self._after(anchor, text)
            if ids is not None:
                return ids
        raise TemplateError(
            f"the tokenizer of {self.tokenizer.name_or_path!r} joins the beginning of {text[:40]!r} to whatever "
            "it goes on from, so it has no tokens of its own"
        )

    def anchors(self, before: str) -> list[str]:
        """What may be put before a text to find the tokens that it has in the midst of another, best first."""
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
