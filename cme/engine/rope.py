"""RoPE with frequencies that follow the longest sequence of a batch: sequences must share batches accordingly."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from cme.engine.packing import Request
from cme.errors import ModelError


def same_frequencies(config: PreTrainedConfig, requests: Sequence[Request]) -> list[list[Request]]:
    """`requests` in parts whose members may share a batch: each gets the frequencies that it has alone.

    Raises:
        ModelError: a request longer than the context of a model with `dynamic` RoPE.
    """
    text_config = config.get_text_config(decoder=True)
    dynamic, longrope = _change(text_config, "dynamic"), _change(text_config, "longrope")
    longest = max((len(request) for request in requests), default=0)
    # `dynamic` changes with every token beyond the context, and keeps what it computed last. The last response
    # token is not fed, because it predicts nothing, and so does not count
    if dynamic is not None and longest - 1 > dynamic:
        raise ModelError(
            f"a sequence of {longest} tokens exceeds the context of {dynamic} beyond which this model's RoPE "
            "(type 'dynamic') gives the same token another score in every batch: shorten it"
        )
    if longrope is None:
        return [list(requests)]
    # `longrope` (Phi-3) has one set of frequencies for sequences up to the original context, and another beyond
    short = [request for request in requests if len(request) - 1 <= longrope]
    long = [request for request in requests if len(request) - 1 > longrope]
    return [part for part in (long, short) if part]


def follows_length(config: PreTrainedConfig) -> str | None:
    """The RoPE type of a model whose frequencies depend on the length of the batch, or None."""
    text_config = config.get_text_config(decoder=True)
    return next((name for name in ("longrope", "dynamic") if _change(text_config, name) is not None), None)


def _change(config: PreTrainedConfig, rope_type: str) -> int | None:
    """Longest sequence with the original frequencies of a RoPE of this type; None without one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]  # one entry per layer type
    for rope in nested or [parameters]:
        if rope.get("rope_type") == rope_type:
            if rope_type == "dynamic":
                return int(config.max_position_embeddings)
            return int(rope["original_max_position_embeddings"])
    return None
