"""Where a response's tokens lie in its text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import processors

from cme.errors import ModelError
from cme.rendering import Renderer


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
        # Byte-level tokenizers may leave white space out of their offsets, which only their post-processor does
        self._tokenizer = copy.deepcopy(renderer.tokenizer.backend_tokenizer)
        self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def align(self, text: str, token_ids: Sequence[int]) -> Alignment:
        """`token_ids` are those of the rendered response; what follows the text in them, the end of the turn, gets
        an empty span at its end. Raises ModelError if they are no tokens of `text`."""
        for space in dict.fromkeys(["", self._space]):
            encoding = self._tokenizer.encode(space + text, add_special_tokens=False)
            n = len(encoding.ids)
            if encoding.ids == list(token_ids[:n]):
                shift = len(space)
                spans = [(max(a - shift, 0), max(b - shift, 0)) for a, b in encoding.offsets]
                spans += [(len(text), len(text))] * (len(token_ids) - n)
                pieces = tuple(str(self._renderer.tokenizer.decode([i])) for i in token_ids)
                return Alignment(text, pieces, tuple(spans))
        raise ModelError(f"the tokens of the response {text[:80]!r} can't be found in its text")

    @property
    def _space(self) -> str:
        # What the renderer may put before a response so that its first token is that of running text
        before = (self._renderer.template or "").removesuffix("{response}")
        return before[len(before.rstrip()) :]
