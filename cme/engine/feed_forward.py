"""Feed-forward layers in chunks of a few hundred tokens, so that their inner vectors, the widest of a model, never
exist for a whole batch. On a CPU that costs no speed, and more tokens fit in a pass."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

CHUNK = 512
"""Tokens per chunk: enough for a matrix product to run at its full speed."""


def in_chunks_throughout(model: PreTrainedModel) -> bool:
    """True if `in_chunks` reaches the feed-forward layers of all decoder layers."""
    layers = decoder_layers(model)
    return len(layers) > 0 and all(_feed_forward(layer) is not None for layer in layers)


@contextlib.contextmanager
def in_chunks(model: PreTrainedModel, tokens: int = CHUNK) -> Iterator[None]:
    """Let dense feed-forward layers on the CPU take at most `tokens` tokens per call; each token's output is its
    own, so the values are the same to rounding. For forward passes without gradients.
    """
    found = {module for layer in decoder_layers(model) if (module := _feed_forward(layer)) is not None}
    for module in found:
        module.forward = _chunked(module.forward, tokens)
    try:
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)  # the class's own is back, if another thread was not first


def _chunked(forward: Callable[..., Tensor], tokens: int) -> Callable[..., Tensor]:
    def chunked(hidden: Tensor) -> Tensor:
        """[..., H] to the same shape."""
        count = -(-hidden[..., 0].numel() // tokens)  # rounded up
        if count <= 1:
            return forward(hidden)
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        # Views [1, n, H], as if of one sequence
        rows = (x.view(1, -1, x.shape[-1]).tensor_split(count, dim=1) for x in (hidden, out))
        for chunk, place in zip(*rows, strict=True):
            place.copy_(forward(chunk))
        return out

    return chunked


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers checkpoints in training, encoders of other modalities included."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _feed_forward(layer: nn.Module) -> nn.Module | None:
    """The module that nearly all decoders in transformers name `mlp`, or None where chunks would not serve."""
    module = getattr(layer, "mlp", None)
    # A compiled layer has the forward of its parts compiled in
    if not isinstance(module, nn.Module) or layer._compiled_call_impl is not None:
        return None
    weights = list(module.parameters())
    # Not a mixture of experts, where a chunk would read as many weights as a batch does, nor a layer whose weights
    # come and go with each call
    plain = (
        "forward" not in module.__dict__  # nobody else has replaced it: accelerate, to fetch weights
        and len(inspect.signature(module.forward).parameters) == 1  # Bloom's adds the residual
        and not any(True for child in module.children() for _ in child.children())
        and all(weight.dim() <= 2 for weight in weights)  # experts are stacked in three dimensions
    )
    return module if plain and weights and all(w.device.type == "cpu" for w in weights) else None
