"""Cross-Model Entropy: score text under a frozen verifier, and train language models on that score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cme.reward import CMEReward
    from cme.scores import ResponseScore, TokenScore, to_frame, tokens_to_frame
    from cme.verifier import Verifier

__all__ = ["CMEReward", "ResponseScore", "TokenScore", "Verifier", "to_frame", "tokens_to_frame"]

_OWNERS = {
    "CMEReward": "cme.reward",
    "ResponseScore": "cme.scores",
    "TokenScore": "cme.scores",
    "Verifier": "cme.verifier",
    "to_frame": "cme.scores",
    "tokens_to_frame": "cme.scores",
}


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds, so it waits until a name that needs it is asked for
    if name not in _OWNERS:
        raise AttributeError(f"module 'cme' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_OWNERS[name]), name)
