"""Where a response's tokens lie in its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import processors

from cme.errors import ModelError
from cme.text.rendering import Renderer


@dataclass(frozen=True)
class Alignment:
    """Attributes:
    text: the response.
    pieces: what each token decodes to on its own.
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

    def __init__(self, renderer: Renderer) -> None:
        """Raises ModelError if the tokenizer is not a fast one."""
        self._renderer = renderer
        if not renderer.tokenizer.is_fast:
            raise ModelError(
                f"{type(renderer.tokenizer).__name__} does not say where its tokens lie in the text: scores of "
                "tokens and of spans need a fast tokenizer (tokenizer.json)"
            )
        self._reader = renderer.control.reader()
        # Byte-level tokenizers may leave white space out of their offsets, which only their post-processor does
        self._reader.backend.post_processor = processors.ByteLevel(trim_offsets=False)

    def align(self, text: str, token_ids: Sequence[int], *, continued: bool = False) -> Alignment:
        """`token_ids` are those of the response as it was rendered, `continued` or not; what follows the text in
        them, the end of the turn, gets an empty span at its end.

        Raises ModelError if they are no tokens of `text`.
        """
        for context in self._renderer.contexts(text, continued=continued):
            before = self._renderer.control.renamed(context)
            ids, offsets = self._reader.read(before + text)
            # Tokens of what is before the response are none of the response's, unless they reach into it
            outside = sum(end <= len(before) for _, end in offsets)
            for skip in range(outside + 1):
                n = len(ids) - skip
                if n and ids[skip:] == list(token_ids[:n]):
                    spans = [_shifted(span, len(before)) for span in offsets[skip:]]
                    return self._alignment(text, token_ids, spans)
        raise ModelError(f"the tokens of the response {text[:80]!r} can't be found in its text")

    def _alignment(self, text: str, token_ids: Sequence[int], spans: list[tuple[int, int]]) -> Alignment:
        pieces = tuple(str(self._renderer.tokenizer.decode([i])) for i in token_ids)
        spans += [(len(text), len(text))] * (len(token_ids) - len(spans))
        for i, (start, end) in enumerate(spans):
            # A space that the tokenizer added by itself is given the character that it was put before
            if not pieces[i].strip() and text[start:end].strip():
                spans[i] = (start, start)
        return Alignment(text, pieces, tuple(spans))


def _shifted(span: tuple[int, int], by: int) -> tuple[int, int]:
    start, end = span
    return max(start - by, 0), max(end - by, 0)
