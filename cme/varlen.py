"""Attention over a whole pack in one call, on CUDA in half precision: flash-attn's kernel, or torch's.

A back end takes queries [Lq, Hq, D] and gathered keys and values [Lk, Hkv, D] of sequences that follow each other.
Query i of a sequence with n queries and m keys sees keys up to m - n + i, which is what both kernels do. Each is
compared with a plain computation before its first use, for every dtype and shape of heads, and left out with a
warning if it fails.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 0.02
"""Of an output whose values are about 1, for kernels that accumulate in float32 and round probabilities."""


class Sequences(NamedTuple):
    """Where each sequence begins.

    Attributes:
        keys: [Lk] indices in the pack.
        cu_queries, cu_keys: [N + 1] int32, cumulative lengths.
        max_queries, max_keys: the largest lengths.
    """

    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int

    @staticmethod
    def of(lengths: list[int], keys: list[Tensor], device: torch.device) -> Sequences:
        """From the number of queries and the keys of each sequence."""
        counts = [len(k) for k in keys]
        return Sequences(
            torch.cat(keys).to(device),
            _cumulative(lengths, device),
            _cumulative(counts, device),
            max(lengths),
            max(counts),
        )


class Options(NamedTuple):
    """Of one attention layer. `window` counts the query itself."""

    scale: float
    window: int | None
    softcap: float | None
    dropout: float


Backend = Callable[[Tensor, Tensor, Tensor, Sequences, Options], Tensor]


def flash_attn(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        sequences.cu_queries,
        sequences.cu_keys,
        sequences.max_queries,
        sequences.max_keys,
        dropout_p=options.dropout,
        softmax_scale=options.scale,
        causal=True,
        window_size=(-1, -1) if options.window is None else (options.window - 1, 0),
        softcap=options.softcap or 0.0,
    )
    return out


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        sequences.cu_queries,
        sequences.cu_keys,
        sequences.max_queries,
        sequences.max_keys,
        scale=options.scale,
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def choose(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Backend | None:
    """The back end for these tensors and options, or None."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not (q.device.type == "cuda" and half and q.shape[-1] == v.shape[-1]):
        return None
    heads = (q.shape[1], k.shape[1], q.shape[2])
    for backend in _installed():
        fits = backend is flash_attn or (options.softcap is None and not options.dropout)
        if fits and works(backend, q.device, q.dtype, heads):
            return backend
    return None


@cache
@torch.inference_mode(False)  # whoever asks first may be scoring, and the check needs gradients
@torch.enable_grad()
def works(backend: Backend, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> bool:
    """Whether `backend` agrees with `plain` on two sequences with ancestors, with and without a window."""
    queries, keys, size = heads
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(40, n, size, generator=generator).to(device, dtype).requires_grad_()
        for n in (queries, keys, keys)
    )
    seen = [torch.arange(10), torch.arange(30), torch.cat([torch.arange(10), torch.arange(30, 40)])]
    sequences = Sequences.of([10, 20, 10], seen, device)
    try:
        for window in (None, 7):
            options = Options(size**-0.5, window, None, 0.0)
            gathered = k.index_select(0, sequences.keys), v.index_select(0, sequences.keys)
            out = backend(q, *gathered, sequences, options)
            out.float().square().sum().backward()
            worst = float((out - plain(q, *gathered, sequences, options)).detach().abs().max())
            if not worst <= TOLERANCE:
                raise RuntimeError(f"an output differs from the plain computation by {worst:.3g}")
    except Exception as error:  # whatever a kernel says of a device that it wasn't built for
        warnings.warn(f"{backend.__name__} is not used for attention over packs: {error}", stacklevel=2)
        return False
    return True


def plain(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options) -> Tensor:
    """The contract of a back end, a sequence at a time, in float32."""
    outputs = []
    starts = zip(sequences.cu_queries.tolist(), sequences.cu_keys.tolist(), strict=True)
    ends = zip(sequences.cu_queries[1:].tolist(), sequences.cu_keys[1:].tolist(), strict=True)
    for (q0, k0), (q1, k1) in zip(starts, ends, strict=False):
        groups = q.shape[1] // k.shape[1]
        keys, values = (x[k0:k1].float().repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        scores = q[q0:q1].float().transpose(0, 1) @ keys.transpose(1, 2) * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        last = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=q.device).unsqueeze(1)
        key = torch.arange(k1 - k0, device=q.device)
        unseen = key > last
        if options.window is not None:
            unseen |= key <= last - options.window
        outputs.append((scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


@cache
def _installed() -> tuple[Backend, ...]:
    found: list[Backend] = []
    if importlib.util.find_spec("flash_attn") is not None:
        found.append(flash_attn)
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        # Earlier releases had other arguments
        if {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
            found.append(torch_varlen)
    return tuple(found)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
