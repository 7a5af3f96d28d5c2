"""Argument checks of `linear_logprob`, each with the value and the remedy in its message."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cme_kernels.stats import IGNORE_INDEX, OPTIONAL_STATS, outside


def check_placement(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError for tensors that are not where the caller says."""
    if isinstance(hidden, DTensor):
        raise ValueError("hidden is a DTensor; give this rank's own rows: hidden.to_local()")
    if group is not None and isinstance(weight, DTensor):
        raise ValueError("with group=, weight must be this rank's own slice of the vocabulary: weight.to_local()")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a ProcessGroup that this rank is a member of, got {group!r}")


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float | Tensor,
    stats: Sequence[str],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Raise ValueError for shapes, dtypes and options that do not fit, without looking at a tensor's values."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    n, vocab_size = len(hidden), len(weight)
    # With a group all ranks learn of it (`tensor_parallel.shard_of`), lest the others wait for this one
    if vocab_size == 0 and group is None:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if targets.shape != (n,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 of shape [{n}], got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and (bias.shape != (vocab_size,) or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be floating-point of shape [{vocab_size}], got {bias.dtype} {tuple(bias.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; convert one of them")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating-point tensor, got {hidden.dtype}")
    # One device for all: the kernels take addresses
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} but {name} on {tensor.device}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature requires a gradient, but none is computed for it; detach it")
        if temperature.dim() and temperature.shape != (n,):
            raise ValueError(f"temperature must be a number or have shape [{n}], got {tuple(temperature.shape)}")
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    # "logprob" is always there and so is no choice
    unknown = set(stats) - set(OPTIONAL_STATS)
    if unknown:
        raise ValueError(f"unknown stats {sorted(unknown)}; choose from {', '.join(OPTIONAL_STATS)}")


def check_values(targets: Tensor, vocab_size: int, row_temperatures: Tensor | None) -> None:
    """Raise IndexError for the first target that is neither in [0, vocab_size) nor IGNORE_INDEX, and ValueError
    for a temperature that is not positive. Reads the tensors: on a GPU that waits for the device."""
    bad = outside(targets, vocab_size)  # [N]
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"targets[{row}] = {int(targets[row])} is outside the vocabulary [0, {vocab_size}); "
            f"use {IGNORE_INDEX} for rows to skip"
        )
    if row_temperatures is not None:
        # NaN compares false, so it is not good either
        good = (row_temperatures > 0) & (row_temperatures < math.inf)
        if not good.all():
            row = int((~good).nonzero()[0])
            value = float(row_temperatures[row])
            raise ValueError(f"temperature must be positive and finite, got temperature[{row}] = {value}")
