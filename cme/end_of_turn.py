"""The token that ends a response."""

from __future__ import annotations

from cme.errors import TemplateError
from cme.rendering import Renderer

_CONTENT = "CONTENT-OF-THE-TURN"


def end_of_turn(renderer: Renderer) -> int:
    """The token with which a response ends: in a chat, the special token that the template writes after it; in
    plain text, and where the template writes none, the end of the text.

    Raises TemplateError if the tokenizer has neither.
    """
    tokenizer = renderer.tokenizer
    if renderer.template is None:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _CONTENT}]
        after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(_CONTENT)[2]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise TemplateError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no token that ends a turn: "
            "leave score_end_of_turn out"
        )
    return int(tokenizer.eos_token_id)
