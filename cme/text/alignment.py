"""Token ids -> the characters of a response's text that each token stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from cme.errors import ModelError
from cme.text.tokens import ControlTokens


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
    spans: tuple[tuple[int, int], ...]

    def select(self, index: Sequence[int]) -> Alignment:
        """The same text with some of its tokens."""
        return Alignment(self.text, tuple(self.pieces[i] for i in index), tuple(self.spans[i] for i in index))


class Aligner:
    """Finds the characters of each token with the offsets of a fast tokenizer.

    A token that is a part of a character (of its bytes) gets the whole character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: ControlTokens) -> None:
        """Raises ModelError if the tokenizer is not a fast one."""
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not say where its tokens lie in the text: scores of "
                "tokens and of spans need a fast tokenizer (tokenizer.json)"
            )
        self._tokenizer = tokenizer
        self._control = control
        self._reader = control.reader()
        # Byte-level tokenizers may leave white space out of their offsets, which only their post-processor does
        self._reader.backend.post_processor = processors.ByteLevel(trim_offsets=False)

    def align(self, text: str, token_ids: Sequence[int], contexts: Iterable[str]) -> Alignment:
        """The characters of `token_ids`, which are those of `text` after one of `contexts` (`Renderer.contexts`).
        Tokens that follow the text, which end the turn, get an empty span at its end.

        Raises ModelError if they are no tokens of `text`.
        """
        for context in contexts:
            before = self._control.renamed(context)
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
        pieces = tuple(str(self._tokenizer.decode([i])) for i in token_ids)
        spans += [(len(text), len(text))] * (len(token_ids) - len(spans))
        # A space that the tokenizer added by itself is given the character that it was put before
        is_added = [not piece.strip() and text[a:b].strip() for piece, (a, b) in zip(pieces, spans, strict=True)]
        found = [(a, a) if added else (a, b) for added, (a, b) in zip(is_added, spans, strict=True)]
        return Alignment(text, pieces, tuple(found))
