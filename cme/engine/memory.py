"""The token budget of a forward pass, from the memory that is free."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn
from transformers import PreTrainedModel

from cme.engine.feed_forward import decoder_layers, in_chunks_throughout
from cme.engine.heap import MIB
from cme.engine.lm_head import input_device

CPU_ALLOWANCE = 96 * MIB
"""Activations beyond it gain no speed on a CPU, where a few thousand tokens keep every core busy. What else a pass
holds (the head's tiles, a chunk's inner vectors, holes in the heap) comes to two thirds of it and more."""

MOST_TOKENS = 32768
"""Larger passes gain no speed on an accelerator, whatever its memory."""

FEWEST_TOKENS = 256
"""A smaller pass would read all weights for little. Where even these do not fit, half as many are tried."""


def token_budget(model: PreTrainedModel) -> int:
    """Tokens in one forward pass that leave memory over.

    On accelerators their activations take half of the free memory; on a CPU CPU_ALLOWANCE or, for large models
    that is little for, an eighth of the weights, and at most half of the free memory.
    """
    devices = {p.device for p in model.parameters() if not p.is_meta} | {input_device(model)}
    # Half, because the estimate has only the activations of one layer in it
    allowance = min(free_memory(device) for device in devices) // 2
    if input_device(model).type == "cpu":
        weights = sum(p.numel() * p.element_size() for p in model.parameters())  # bytes
        allowance = min(allowance, max(CPU_ALLOWANCE, weights // 8))
    return int(min(max(allowance // bytes_per_token(model), FEWEST_TOKENS), MOST_TOKENS))


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of the activations per token in the layer where most are alive.

    That is a feed-forward layer, with its inner vectors, the residual and its copies; or attention of the plain
    kind, where `cme.engine.feed_forward` takes all feed-forward layers in chunks.
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    attention = [_attention_width(layer) for layer in decoder_layers(model)]
    if in_chunks_throughout(model) and None not in attention:
        # Residual and norm. SmolLM2-135M in float32: 16 KB, to which measurements add a fifth
        return int(model.dtype.itemsize * (2 * hidden + max(width for width in attention if width is not None)))
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if isinstance(inner, list | tuple):  # one per layer
        inner = max(inner)
    # Gate, its activation, up and the product; the residual and its copies. SmolLM2-135M in float32: 38 KB, and
    # measurements are within a tenth of it
    return int(model.dtype.itemsize * (4 * inner + 6 * hidden))


def _attention_width(layer: nn.Module) -> int | None:
    """Numbers per token that are alive beside the residual and its norm: queries with three temporaries of their
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
        # Torch's allocator keeps what was freed, which the driver counts as used
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    available, allowed = int(psutil.virtual_memory().available), cgroup_free_memory()
    return available if allowed is None else min(available, allowed)


def cgroup_free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the limits of this process's control groups leave, which a Linux container runs under and the
    system's own figures leave out; None without a limit, or without groups.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Every group above the process counts too. A container may see its own group as the topmost one, although
        # the process's path names groups above it, so groups that are not there are passed over
        inside = PurePosixPath(path).relative_to("/")
        free += [_free_in(mount / group, *names) for group in (inside, *inside.parents)]
    return min((f for f in free if f is not None), default=None)


def _free_in(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if most == "max":
        return None
    # Files that were read and are not in use count as used, but give way to allocations
    return max(int(most) - used + int(stat.get(reclaimable, 0)), 0)
