"""The two ceilings of a roofline, measured: how fast memory is copied, and the bare matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Inputs
from benchmarks.timing import CUDA, seconds

COPY_BYTES = 2**31 if CUDA else 2**28
"""Far more than any cache holds."""

RUNS = 10 if CUDA else 3

ALLOCATING, PREALLOCATED = "matmul", "matmul-preallocated"
"""`hidden @ weight.T`, which allocates the logits as users' code does, and the same into memory that it has. On a
CPU the first pays for pages that the system hands out; on a GPU the allocator keeps memory and they are one."""


def copy_bandwidth(dtype: torch.dtype, device: torch.device) -> float:
    """Bytes read and written by the fastest of some copies, per second."""
    source = torch.ones(COPY_BYTES // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / fastest(lambda: target.copy_(source))


def matmuls(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """The bare matmuls of a shape, by name, for a time without gradients."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    out = hidden.new_empty(len(hidden), len(weight))
    return {ALLOCATING: lambda: hidden @ weight.T, PREALLOCATED: lambda: torch.mm(hidden, weight.T, out=out)}


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls: a ceiling is what a machine can do, not its median."""
    call()
    return min(seconds(call) for _ in range(RUNS))
