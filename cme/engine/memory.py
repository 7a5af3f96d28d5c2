"""Tokens that one forward pass may have, by the free memory."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn
from transformers import PreTrainedModel

from cme.engine import cgroups
from cme.engine.feed_forward import decoder_layers, in_chunks_throughout
from cme.engine.lm_head import input_device

MIB = 2**20
CPU_ALLOWANCE = 96 * MIB
"""Activations beyond it gain no speed on a CPU, where a few thousand tokens keep every core busy. What else a pass
holds (the head's tiles, a chunk's inner vectors, holes in the heap) comes to two thirds of it and more."""

MOST_TOKENS = 32768
"""Likewise on an accelerator, whatever its memory."""

FEWEST_TOKENS = 256


def token_budget(model: PreTrainedModel) -> int:
    """Tokens in one forward pass that leave memory over.

    On accelerators their activations take half of the free memory; on a CPU CPU_ALLOWANCE or, for large models
    that is little for, an eighth of the weights, and at most half of the free memory.
    """
    devices = {p.device for p in model.parameters() if not p.is_meta} | {input_device(model)}
    allowance = min(free_memory(device) for device in devices) // 2
    if input_device(model).type == "cpu":
        allowance = min(allowance, max(CPU_ALLOWANCE, _weight_bytes(model) // 8))
    return int(min(max(allowance // bytes_per_token(model), FEWEST_TOKENS), MOST_TOKENS))


def bytes_per_token(model: PreTrainedModel) -> int:
    """What a token's activations take in the layer where most are alive.

    In a feed-forward layer these are its inner vectors, the residual and its copies; what was measured is within a
    tenth of it (38 KB of SmolLM2-135M in float32). Where `cme.engine.feed_forward` takes all of these in chunks,
    and attention is of the plain kind, it is attention (16 KB, to which measurements add a fifth).
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    attention = [_attention_width(layer) for layer in decoder_layers(model)]
    if in_chunks_throughout(model) and None not in attention:
        return int(model.dtype.itemsize * (2 * hidden + max(width for width in attention if width is not None)))
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if isinstance(inner, list | tuple):  # one a layer
        inner = max(inner)
    return int(model.dtype.itemsize * (4 * inner + 6 * hidden))


def _attention_width(layer: nn.Module) -> int | None:
    """Numbers a token that are alive beside the residual and its norm: queries with the three temporaries of their
    rotation, keys and values. None for layers that hold more than such attention and a feed-forward layer."""
    attention = getattr(layer, "self_attn", None)
    q, k, v = (getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    if not (isinstance(q, nn.Linear) and isinstance(k, nn.Linear) and isinstance(v, nn.Linear)):
        return None
    parts = {name.split(".")[0] for name, weight in layer.named_parameters() if weight.dim() > 1}
    if not parts <= {"self_attn", "mlp"}:
        return None
    return 4 * q.out_features + 3 * max(k.out_features, v.out_features)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`; for devices other than CUDA's, in main memory, within the
    limits of a container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    available, allowed = int(psutil.virtual_memory().available), cgroups.free_memory()
    return available if allowed is None else min(available, allowed)


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
