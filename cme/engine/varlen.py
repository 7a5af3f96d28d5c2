"""Back ends that compute attention over a whole pack in one call, on CUDA.

A back end takes queries [Lq, Hq, D] and gathered keys and values [Lk, Hkv, D] of sequences that follow each other.
Query i of a sequence with n queries and m keys sees keys up to m - n + i, as in flash-attn. The first that is
installed and whose kernel takes the call is used:

| back end       | dtype        | size of values | softcap | dropout | sinks |
|----------------|--------------|----------------|---------|---------|-------|
| `flash_attn`   | 16 bits      | as of keys     | yes     | yes     | no    |
| `torch_varlen` | 16 bits      | as of keys     | no      | no      | no    |
| `flex`         | 16, 32 bits  | any            | yes     | no      | yes   |

A back end is compared with `plain` before its first use, for each `Call`; one that fails is left out with a
warning.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cme.engine.plan import AttentionOptions, Sequences
from cme.errors import is_out_of_memory

TOLERANCE = {2: 0.03, 4: 1e-3}
"""By bytes of the dtype: largest norm of an error relative to what is right, of outputs and gradients, for kernels
that accumulate in float32 and round probabilities."""

FLEX_VARIANTS = 128
"""Most variants of flex attention that are compiled in a process: head sizes, options and modes are variants of
one function, and past the limit, 8 by default, it would run uncompiled."""

Backend = Callable[[Tensor, Tensor, Tensor, Sequences, AttentionOptions], Tensor]


class Call(NamedTuple):
    """Properties of a call that a back end's kernel must have been written for."""

    dtype: torch.dtype
    query_heads: int
    key_heads: int
    key_size: int
    value_size: int
    softcap: bool = False
    dropout: bool = False
    sinks: bool = False


def flash_attn(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        *sequences.lengths,
        dropout_p=options.dropout,
        softmax_scale=options.scale,
        causal=True,
        window_size=(-1, -1) if options.window is None else (options.window - 1, 0),
        softcap=options.softcap or 0.0,
    )
    return out


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        *sequences.lengths,
        scale=options.scale,
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def flex(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    sinks = options.sinks
    # A tensor, because the kernel has no place for a number that may change
    cap = None if options.softcap is None else torch.tensor(options.softcap, device=q.device)
    with torch._dynamo.config.patch(recompile_limit=FLEX_VARIANTS):
        out: Any = _compiled_flex()(
            *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),  # [1, heads, L, D]
            score_mod=None if cap is None else lambda score, *index: cap * torch.tanh(score / cap),
            block_mask=sequences.block_mask(options.window),
            scale=options.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
    if sinks is not None:
        out, aux = out
        # The keys' share of a softmax that has exp(sink) in its sum, too: exp(lse) / (exp(lse) + exp(sink))
        share = torch.sigmoid(aux.lse - sinks.unsqueeze(1))  # [1, Hq, Lq]
        out = out * share.unsqueeze(-1).to(out.dtype)
    attended: Tensor = out.squeeze(0).transpose(0, 1)
    return attended


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def choose(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Backend | None:
    """The back end for these tensors and options, or None."""
    if q.device.type != "cuda":
        return None
    sizes = (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    call = Call(q.dtype, *sizes, options.softcap is not None, options.dropout > 0, options.sinks is not None)
    return next((b for b in _installed() if takes(b, call) and works(b, q.device, call)), None)


def takes(backend: Backend, call: Call) -> bool:
    """True if the kernel knows all that is asked of it: the table above."""
    if backend is flex:
        return call.dtype != torch.float64 and not call.dropout
    fits = call.dtype.itemsize == 2 and call.key_size == call.value_size and not call.sinks
    return fits and (backend is flash_attn or not (call.softcap or call.dropout))


@cache
@torch.inference_mode(False)  # whoever asks first may be scoring, and the check needs gradients
@torch.enable_grad()
def works(backend: Backend, device: torch.device, call: Call) -> bool:
    """True if `backend` agrees with `plain` in outputs and gradients on sequences with and without ancestors and
    windows. Of dropout only the mean is known, and that it is random."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, call.dtype).requires_grad_()

    q = random(400, call.query_heads, call.key_size)
    k, v = (random(400, call.key_heads, size) for size in (call.key_size, call.value_size))
    leaves = (q, k, v, *([random(call.query_heads)] if call.sinks else []))
    # A prompt of 100 tokens, and two responses to it, of 200 and of 100
    seen = [torch.arange(100), torch.arange(300), torch.cat([torch.arange(100), torch.arange(300, 400)])]
    sequences = Sequences.of([100, 200, 100], seen, device)
    keys, values = k.index_select(0, sequences.keys), v.index_select(0, sequences.keys)

    def results(backend: Backend, options: AttentionOptions) -> list[Tensor]:
        out = backend(q, keys, values, sequences, options)
        # The square, because the gradient of a plain sum would be the same for every output
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves, retain_graph=True)]

    cap, sinks = (2.0 if call.softcap else None), (leaves[3] if call.sinks else None)
    options = AttentionOptions(call.key_size**-0.5, None, cap, 0.0, sinks)
    try:
        for window in (None, 7):
            each = (results(b, options._replace(window=window)) for b in (backend, plain))
            for found, right in zip(*each, strict=True):
                error = float((found.float() - right.float()).norm() / right.float().norm())
                if not error <= TOLERANCE[call.dtype.itemsize]:  # NaN is not
                    raise RuntimeError(f"an output or a gradient differs from what is right by {error:.2g} of it")
        if call.dropout:
            # Of values that are all 1 the output is the sum of the weights that are left, scaled to a mean of 1
            kept = backend(q, keys, torch.ones_like(values), sequences, options._replace(dropout=0.5)).float()
            if not (0.9 < kept.mean() < 1.1 and kept.std() > 0.01):
                raise RuntimeError(f"dropout leaves {kept.mean():.2g} ± {kept.std():.2g} of the weights, not 1")
    except Exception as error:  # whatever a kernel says of a device that it was not built for
        if is_out_of_memory(error):  # which says nothing about the kernel
            raise
        warnings.warn(f"{backend.__name__} is not used for attention over packs: {error}", stacklevel=2)
        return False
    return True


def plain(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> Tensor:
    """The contract of a back end, sequence by sequence, in float32."""
    outputs = []
    starts = zip(sequences.cu_queries.tolist(), sequences.cu_keys.tolist(), strict=True)
    ends = zip(sequences.cu_queries[1:].tolist(), sequences.cu_keys[1:].tolist(), strict=True)
    for (q0, k0), (q1, k1) in zip(starts, ends, strict=False):
        groups = q.shape[1] // k.shape[1]
        keys, values = (x[k0:k1].float().repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        scores = q[q0:q1].float().transpose(0, 1) @ keys.transpose(1, 2) * options.scale  # [Hq, n, m]
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        # The last key of query i is m - n + i; a window of w tokens begins w - 1 before it
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

        # torch 2.10 has it with other arguments
        if {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
            found.append(torch_varlen)
    # Without it there is no log-sum-exp, which sinks need
    if hasattr(importlib.import_module("torch.nn.attention.flex_attention"), "AuxRequest"):
        found.append(flex)
    return tuple(found)
