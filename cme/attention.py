"""Attention over packs, registered with transformers as the implementation `cme_packed`.

Packed calls carry an `AttentionPlan` in the keyword argument `cme_plan`, which every decoder in transformers
hands down to its attention layers, through gradient checkpointing too. Calls without a plan (generation,
padded batches) are ordinary attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "cme_packed"


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a pack. They see each other causally, and every token of their ancestors."""

    start: int
    length: int
    parent: Segment | None = None

    @property
    def offset(self) -> int:
        """Position of the first token, which is also the number of ancestor tokens."""
        return 0 if self.parent is None else self.parent.offset + self.parent.length

    def keys(self) -> list[int]:
        """Indices in the pack of all tokens that the segment's last token sees, by position."""
        own = range(self.start, self.start + self.length)
        return [*own] if self.parent is None else [*self.parent.keys(), *own]


@dataclass(frozen=True)
class Bucket:
    """Segments of similar shape, padded to one: the batch of one attention call.

    Attributes:
        queries: [B, Lq] indices in the pack; padding repeats the segment's last token.
        keys: [B, Lk] likewise.
        query_positions, key_positions: [B, Lq], [B, Lk]; keys are in order of position, so a key's position
            is its column. Padding keys lie beyond every query.
        causal: every row is a whole sequence, so that plain top-left causal attention is right.
    """

    queries: Tensor
    keys: Tensor
    query_positions: Tensor
    key_positions: Tensor
    causal: bool
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, window: int | None) -> Tensor | None:
        """[B, 1, Lq, Lk], true where a query sees a key; None where causal attention needs no mask."""
        if window is not None and window >= self.keys.shape[1]:
            window = None
        if self.causal and window is None:
            return None
        if window not in self._masks:  # the same for every layer with this window
            query, key = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
            seen = key <= query
            self._masks[window] = seen if window is None else seen & (key > query - window)
        return self._masks[window]


@dataclass(frozen=True)
class AttentionPlan:
    """Which tokens of a pack of L tokens attend to which.

    Attributes:
        buckets: attention calls whose queries together cover every token.
        order: [L] where each token's output stands among the concatenated outputs of the buckets.
    """

    buckets: tuple[Bucket, ...]
    order: Tensor

    @staticmethod
    def of(segments: Sequence[Segment], device: torch.device) -> AttentionPlan:
        order = [0] * sum(s.length for s in segments)
        base, buckets = 0, []
        for members in _similar(segments):
            lq = max(s.length for s in members)
            for row, s in enumerate(members):
                for i in range(s.length):
                    order[s.start + i] = base + row * lq + i
            base += len(members) * lq
            buckets.append(_bucket(members, device))
        return AttentionPlan(tuple(buckets), torch.tensor(order, device=device))


def _similar(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Split segments into buckets in which no row's scores are more than half padding."""
    buckets: list[list[Segment]] = []
    area = 0  # Lq * Lk of the open bucket
    for s in sorted(segments, key=lambda s: (s.parent is None, s.offset + s.length, s.length), reverse=True):
        fits = buckets and (buckets[-1][0].parent is None) == (s.parent is None)
        if not fits or 2 * s.length * (s.offset + s.length) < area:
            buckets.append([])
            area = 0
        buckets[-1].append(s)
        rows, columns = max(m.length for m in buckets[-1]), buckets[-1][0].offset + buckets[-1][0].length
        area = rows * columns
    return buckets


def _bucket(segments: Sequence[Segment], device: torch.device) -> Bucket:
    lq = max(s.length for s in segments)
    lk = max(s.offset + s.length for s in segments)
    queries, keys, query_positions, key_positions = [], [], [], []
    for s in segments:
        own, seen = range(s.start, s.start + s.length), s.keys()
        queries.append([*own, *[own[-1]] * (lq - len(own))])
        keys.append([*seen, *[seen[-1]] * (lk - len(seen))])
        query_positions.append([min(s.offset + i, s.offset + s.length - 1) for i in range(lq)])
        key_positions.append([j if j < len(seen) else lk for j in range(lk)])
    return Bucket(
        queries=torch.tensor(queries, device=device),
        keys=torch.tensor(keys, device=device),
        query_positions=torch.tensor(query_positions, device=device),
        key_positions=torch.tensor(key_positions, device=device),
        causal=all(s.parent is None for s in segments),
    )


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

    With a plan B is 1 and `attention_mask` is ignored. `softcap` bounds the scores (Gemma 2), `s_aux` [Hq] are
    attention sinks (gpt-oss); SDPA knows neither, so these two take explicit products.
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
    k, v = _exact_sum(k), _exact_sum(v)
    outputs = []
    for bucket in cme_plan.buckets:
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
    return torch.cat(outputs).index_select(0, cme_plan.order).unsqueeze(0), None


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
            scores.masked_fill(~mask, -math.inf)
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
