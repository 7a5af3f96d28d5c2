"""Attention over packs, registered with transformers as the implementation `cme_packed`.

Packed calls carry an `AttentionPlan` in the keyword argument `cme_plan`, which every decoder in transformers
hands down to its attention layers, through gradient checkpointing too. A call is computed in the first of these
ways whose condition holds:

| way             | condition                                                                       |
|-----------------|---------------------------------------------------------------------------------|
| `_without_plan` | no plan (generation, padded batches): ordinary attention under a mask           |
| `_cascade`      | CPU, no gradients, no window that cuts a sequence, no softcap, sinks or dropout |
| `_in_one_call`  | CUDA, and a back end of `cme.engine.varlen` takes the dtype, heads and options  |
| `_in_buckets`   | all other packs: segments of similar shape, padded to one batch                 |

SDPA knows neither softcaps (Gemma 2) nor attention sinks (gpt-oss), so with them `_without_plan` and `_in_buckets`
compute the scores in `_explicit`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cme.engine import varlen
from cme.engine.plan import AttentionOptions, AttentionPlan, Bucket, Cascade

IMPLEMENTATION = "cme_packed"


@torch.compiler.disable  # packs differ in their plans; a compiled layer calls it as it is
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cme_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the contract of transformers: query [B, Hq, L, D], key and value [B, Hkv, L, D] to
    [B, L, Hq, D]. With a plan B is 1 and `attention_mask` is ignored. `s_aux` [Hq] are attention sinks.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scale, sliding_window, softcap, dropout, s_aux)
    if cme_plan is None:
        return _without_plan(module, query, key, value, attention_mask, options, **kwargs), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, heads, D]
    if _cascades(q, k, v, cme_plan, options):
        out = _cascade(q, k, v, cme_plan.cascade, scale)
    elif (backend := varlen.choose(q, k, v, options)) is not None:
        out = _in_one_call(backend, q, k, v, cme_plan, options)
    else:
        out = _in_buckets(q, k, v, cme_plan, options)
    return out.unsqueeze(0), None  # [1, L, Hq, D]


def _without_plan(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions, **rest: Any
) -> Tensor:
    """[B, L, Hq, D]. `mask` comes from transformers and has the sliding window in it."""
    if not options.explicit:
        out, _ = sdpa_attention_forward(
            module, q, k, v, mask, dropout=options.dropout, scaling=options.scale, **rest
        )
        return out
    if mask is None and q.shape[2] > 1:
        # The queries are the last of the keys: a cache may hold those before them
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[2] - q.shape[2])
    return _explicit(q, k, v, mask, options).transpose(1, 2).contiguous()


def _cascades(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, options: AttentionOptions) -> bool:
    """The condition of `_cascade`. The op that returns the log-sum-exp of its scores is a CPU's, has no gradient
    for that, and knows no window."""
    return (
        q.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
        and q.shape[-1] == v.shape[-1]
        and (options.window is None or options.window >= plan.longest)
        and not (options.explicit or options.dropout)
    )


def _cascade(q: Tensor, k: Tensor, v: Tensor, cascade: Cascade, scale: float) -> Tensor:
    """[L, Hq, D], without masks and copies of keys (Hydragen, arXiv:2402.05099).

    Softmax over a union of keys A and B is the mean of the softmaxes over A and B, weighted by their sums of
    exponentials.
    """
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    lse = torch.empty(q.shape[:2], dtype=out.dtype)  # [L, Hq]
    # Each token and those before it in its own segment: B = count sequences of length tokens
    for start, count, length in cascade.own:
        span = slice(start, start + count * length)
        queries, keys, values = (x[span].unflatten(0, (count, length)) for x in (q, k, v))
        part, part_lse = _attend(queries, keys, values, scale, causal=True)
        out[span], lse[span] = part.flatten(0, 1), part_lse.flatten(0, 1)
    # Then each ancestor, for all of its descendants at once
    for start, end, stop in cascade.shared:
        ancestor, span = slice(start, end), slice(end, stop)
        part, part_lse = _attend(q[None, span], k[None, ancestor], v[None, ancestor], scale, causal=False)
        # exp(lse_B) / (exp(lse_A) + exp(lse_B)) = sigmoid(lse_B - lse_A)
        share = torch.sigmoid(part_lse[0] - lse[span])
        out[span].lerp_(part[0].to(out.dtype), share.unsqueeze(-1))
        lse[span] = torch.logaddexp(lse[span], part_lse[0])
    return out.to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """[B, L, heads, D] to the output [B, Lq, Hq, D] and the log of the sums of exponentials [B, Lq, Hq]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _in_one_call(
    backend: varlen.Backend, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, options: AttentionOptions
) -> Tensor:
    """[L, Hq, D]. The keys that a segment sees are gathered, so that they stand in one piece."""
    sequences = plan.sequences(q.device)
    keys, values = (_exact_sum(x).index_select(0, sequences.keys).to(q.dtype) for x in (k, v))  # [Lk, Hkv, D]
    return backend(q, keys, values, sequences, options)


def _in_buckets(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, options: AttentionOptions) -> Tensor:
    """[L, Hq, D], with one call per bucket."""
    k, v = _exact_sum(k), _exact_sum(v)
    # order [L]: where in the outputs, padding included, each token's row is
    buckets, order = plan.buckets(q.device)
    outputs = [_attend_bucket(q, k, v, bucket, options) for bucket in buckets]
    return torch.cat(outputs).index_select(0, order)


def _attend_bucket(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, options: AttentionOptions) -> Tensor:
    """[B * Lq, Hq, D], rows of padding included."""
    queries = _gather(q, bucket.queries)
    keys, values = (_gather(x, bucket.keys).to(q.dtype) for x in (k, v))
    if options.explicit:
        out = _explicit(queries, keys, values, bucket.visible(options.window), options)
    else:
        mask, grouped = bucket.mask(options.window), queries.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(
            queries, keys, values, mask, options.dropout, mask is None, scale=options.scale, enable_gqa=grouped
        )
    return out.transpose(1, 2).flatten(0, 1)  # from [B, Hq, Lq, D]


def _exact_sum(x: Tensor) -> Tensor:
    # A prompt's keys are gathered once per response; their gradients must add up in float32
    return x.float() if x.requires_grad and x.dtype != torch.float64 else x


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """[L, heads, D] and [B, n] to [B, heads, n, D]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    """[B, heads, L, D] to softmax(softcap(q k^T scale)) v, with one more column of scores for the sink. Like the
    eager attention of Gemma 2 and gpt-oss: products in the input dtype, softmax in float32."""
    groups = q.shape[1] // k.shape[1]  # queries per key, as in grouped-query attention
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * options.scale  # [B, Hq, Lq, Lk]
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite where a padded row sees nothing
            if mask.dtype == torch.bool
            else scores + mask[..., : scores.shape[-1]]
        )
    if options.sinks is not None:
        column = options.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    if options.sinks is not None:
        weights = weights[..., :-1]  # attention that goes to the sink goes nowhere
    return F.dropout(weights, options.dropout) @ v


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
