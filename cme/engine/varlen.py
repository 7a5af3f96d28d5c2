"""Attention over a whole pack in one call, on CUDA: the kernels of flash-attn, of torch, or of flex attention.

A back end takes queries [Lq, Hq, D] and gathered keys and values [Lk, Hkv, D] of sequences that follow each other.
Query i of a sequence with n queries and m keys sees keys up to m - n + i, as in flash-attn. A back end is compared
with a plain computation before its first use, for each dtype, shape of heads and kind of options; one that fails
is left out with a warning.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cme.engine.plan import Sequences
from cme.errors import is_out_of_memory

if TYPE_CHECKING:
    pass

TOLERANCE = {2: 0.03, 4: 1e-3}
"""By bytes of the dtype: largest norm of an error relative to what is right, of outputs and gradients, for kernels
that accumulate in float32 and round probabilities."""

FLEX_VARIANTS = 128
"""Most variants of flex attention that are compiled in a process."""


class Options(NamedTuple):
    """Of one attention layer. `window` counts the query itself; `sinks` [Hq] are scores of a key with value 0."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None


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


def flex(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    sinks = options.sinks
    # A tensor, because the kernel has no place for a number that may change
    cap = None if options.softcap is None else torch.tensor(options.softcap, device=q.device)
    # Head sizes, options and modes are variants of one function; past the limit it would run uncompiled
    with torch._dynamo.config.patch(recompile_limit=FLEX_VARIANTS):
        out: Any = _compiled_flex()(
            *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
            score_mod=None if cap is None else lambda score, *index: cap * torch.tanh(score / cap),
            block_mask=sequences.block_mask(options.window),
            scale=options.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
    if sinks is not None:
        out, aux = out
        share = torch.sigmoid(aux.lse - sinks.unsqueeze(1))  # of the softmax, that goes to keys
        out = out * share.unsqueeze(-1).to(out.dtype)
    attended: Tensor = out.squeeze(0).transpose(0, 1)
    return attended


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def choose(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Backend | None:
    """The back end for these tensors and options, or None."""
    if q.device.type != "cuda":
        return None
    heads = (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    kind = (options.softcap is not None, options.dropout > 0, options.sinks is not None)
    for backend in _installed():
        if _takes(backend, q.dtype, heads, kind) and works(backend, q.device, q.dtype, heads, kind):
            return backend
    return None


Heads = tuple[int, int, int, int]
"""Of the queries, and of the keys; the size of both, and of the values."""

Kind = tuple[bool, bool, bool]
"""Whether there is a softcap, dropout, sinks."""


def _takes(backend: Backend, dtype: torch.dtype, heads: Heads, kind: Kind) -> bool:
    """Whether its kernel knows all that is asked of it."""
    softcap, dropout, sinks = kind
    if backend is flex:
        return dtype != torch.float64 and not dropout
    fits = dtype.itemsize == 2 and heads[2] == heads[3] and not sinks
    return fits and (backend is flash_attn or not (softcap or dropout))


@cache
@torch.inference_mode(False)  # whoever asks first may be scoring, and the check needs gradients
@torch.enable_grad()
def works(backend: Backend, device: torch.device, dtype: torch.dtype, heads: Heads, kind: Kind) -> bool:
    """Whether `backend` agrees with `plain` on two sequences with ancestors, with and without a window, in outputs
    and gradients. Of dropout only the mean is known, and that it is random."""
    softcap, dropout, sinks = kind
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    q, k, v = random(400, heads[0], heads[2]), random(400, heads[1], heads[2]), random(400, heads[1], heads[3])
    leaves = (q, k, v, *([random(heads[0])] if sinks else []))
    seen = [torch.arange(100), torch.arange(300), torch.cat([torch.arange(100), torch.arange(300, 400)])]
    sequences = Sequences.of([100, 200, 100], seen, device)
    keys, values = k.index_select(0, sequences.keys), v.index_select(0, sequences.keys)

    def results(backend: Backend, options: Options) -> list[Tensor]:
        out = backend(q, keys, values, sequences, options)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves, retain_graph=True)]

    options = Options(heads[2] ** -0.5, None, 2.0 if softcap else None, 0.0, leaves[3] if sinks else None)
    try:
        for window in (None, 7):
            each = (results(b, options._replace(window=window)) for b in (backend, plain))
            for found, right in zip(*each, strict=True):
                error = float((found.float() - right.float()).norm() / right.float().norm())
                if not error <= TOLERANCE[dtype.itemsize]:
                    raise RuntimeError(f"an output or a gradient differs from what is right by {error:.2g} of it")
        if dropout:
            kept = backend(q, keys, torch.ones_like(values), sequences, options._replace(dropout=0.5)).float()
            if not (0.9 < kept.mean() < 1.1 and kept.std() > 0.01):
                raise RuntimeError(f"dropout leaves {kept.mean():.2g} ± {kept.std():.2g} of the weights, not 1")
    except Exception as error:  # whatever a kernel says of a device that it wasn't built for
        if is_out_of_memory(error):  # which says nothing about the kernel
            raise
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
        scores = scores.masked_fill(unseen, -torch.inf)
        if options.sinks is not None:
            column = options.sinks.float()[:, None, None].expand(-1, q1 - q0, 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = F.dropout(scores.softmax(-1), options.dropout)
        outputs.append((weights[..., : k1 - k0] @ values).transpose(0, 1))
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
    if hasattr(importlib.import_module("torch.nn.attention.flex_attention"), "AuxRequest"):  # likewise
        found.append(flex)
    return tuple(found)
