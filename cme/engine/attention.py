"""Attention over packs, registered with transformers as the implementation `cme_packed`.

Packed calls carry an `AttentionPlan` in the keyword argument `cme_plan`, which every decoder in transformers
hands down to its attention layers, through gradient checkpointing too. Calls without a plan (generation,
padded batches) are ordinary attention.
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
from cme.engine.plan import AttentionPlan, Bucket, Cascade

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
    [B, L, Hq, D].

    With a plan B is 1 and `attention_mask` is ignored. On a CPU without gradients it is a cascade, on CUDA one
    call of a back end in `cme.engine.varlen`, else one SDPA call per bucket. `softcap` bounds the scores
    (Gemma 2), `s_aux` [Hq] are attention sinks (gpt-oss); SDPA has neither, so these two take explicit products.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    explicit = softcap is not None or s_aux is not None
    if cme_plan is None:
        if not explicit:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if attention_mask is None and query.shape[2] > 1:
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
        out = _explicit(query, key, value, attention_mask, scale, dropout, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, heads, D]
    if not explicit and not dropout and _cascades(q, k, v, cme_plan, sliding_window):
        return _cascade(q, k, v, cme_plan.cascade, scale).unsqueeze(0), None
    options = varlen.Options(scale, sliding_window, softcap, dropout, s_aux)
    backend = varlen.choose(q, k, v, options)
    k, v = _exact_sum(k), _exact_sum(v)
    if backend is not None:
        sequences = cme_plan.sequences(q.device)
        seen_k, seen_v = (x.index_select(0, sequences.keys).to(q.dtype) for x in (k, v))
        return backend(q, seen_k, seen_v, sequences, options).unsqueeze(0), None
    outputs = []
    buckets, order = cme_plan.buckets(q.device)
    for bucket in buckets:
        bq = _gather(q, bucket.queries)
        bk, bv = (_gather(x, bucket.keys).to(q.dtype) for x in (k, v))
        mask = bucket.mask(sliding_window)
        if explicit:
            mask = _causal(bucket) if mask is None else mask
            out = _explicit(bq, bk, bv, mask, scale, dropout, softcap, s_aux)
        else:
            out = F.scaled_dot_product_attention(
                bq,
                bk,
                bv,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=bq.shape[1] != bk.shape[1],
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B * Lq, Hq, D]
    return torch.cat(outputs).index_select(0, order).unsqueeze(0), None


def _cascades(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None) -> bool:
    # The op that says how much weight its softmax had is a CPU's, has no gradient for that, and knows no window
    return (
        q.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
        and q.shape[-1] == v.shape[-1]
        and (window is None or window >= plan.longest)
    )


def _cascade(q: Tensor, k: Tensor, v: Tensor, cascade: Cascade, scale: float) -> Tensor:
    """[L, Hq, D]. Softmax over a union of keys is the mean of the softmaxes over its parts, weighted by their sums
    of exponentials."""
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    lse = torch.empty(q.shape[:2], dtype=out.dtype)
    for start, count, length in cascade.own:
        span = slice(start, start + count * length)
        queries, keys, values = (x[span].unflatten(0, (count, length)) for x in (q, k, v))
        part, part_lse = _attend(queries, keys, values, scale, causal=True)
        out[span], lse[span] = part.flatten(0, 1), part_lse.flatten(0, 1)
    for start, end, stop in cascade.shared:
        ancestor, span = slice(start, end), slice(end, stop)
        part, part_lse = _attend(q[None, span], k[None, ancestor], v[None, ancestor], scale, causal=False)
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


def _exact_sum(x: Tensor) -> Tensor:
    # A prompt's keys are gathered once per response; their gradients must add up in float32
    return x.float() if x.requires_grad and x.dtype != torch.float64 else x


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """[L, heads, D] and [B, n] to [B, heads, n, D]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _causal(bucket: Bucket) -> Tensor:
    return bucket.key_positions[:, None, None, :] <= bucket.query_positions[:, None, :, None]


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """softmax over keys of softcap(q k^T scale), with one more column for the sink, times v. Like the eager
    attention of Gemma 2 and gpt-oss: products in the input dtype, softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite where a padded row sees nothing
            if mask.dtype == torch.bool
            else scores + mask[..., : scores.shape[-1]]
        )
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]  # attention that goes to the sink goes nowhere
    return F.dropout(weights, dropout) @ v


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
