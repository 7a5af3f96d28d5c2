"""The policy's per-token log-probabilities: rows that share a prompt share its encoding, and no logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cme.engine.forward import score_batch
from cme.engine.packing import Batch, Request, empty_batch, pack


def add_packed_forward(model: PreTrainedModel) -> None:
    """Let `model(cme_batch=batch)` return statistics of the batch's response tokens, a dict of tensors [N].

    They are computed inside the model's own forward, so that wrappers (DDP, FSDP, PEFT) see an ordinary call, with
    their hooks around it. Without `cme_batch` the forward is the original one. Add it before wrapping.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        cme_batch: Batch | None = None,
        cme_stats: Sequence[str] = (),
        cme_temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if cme_batch is None:
            return original(*args, **kwargs)
        stats = score_batch(self, cme_batch, cme_stats, cme_temperature)
        return {name: getattr(stats, name) for name in ("logprob", *cme_stats)}

    model.forward = types.MethodType(forward, model)


def packed_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropies, in nats) of the last `logits_to_keep` tokens of each row.

    Args:
        model: after `add_packed_forward`, wrapped or not.
        input_ids: [B, L], prompts left-padded, completions right-padded, as TRL lays them out.
        attention_mask: [B, L].

    Returns:
        float32 [B, logits_to_keep], 0 where the mask is. One forward pass of the model whatever the mask, so
        that every rank of a distributed run makes as many.
    """
    requests, columns = _requests(input_ids, attention_mask, logits_to_keep)
    batch = pack(requests, input_ids.device) if requests else empty_batch(input_ids.device)
    index = torch.tensor(
        [j for i in batch.members for j in columns[i]], dtype=torch.int64, device=input_ids.device
    )
    stats = ("entropy",) if entropy else ()
    out = model(cme_batch=batch, cme_stats=stats, cme_temperature=temperature)

    def scatter(values: Tensor) -> Tensor:
        # Empty for an empty batch, yet in the graph: a rank without tokens still has gradients, of 0
        flat = torch.zeros(input_ids.shape[0] * logits_to_keep, dtype=values.dtype, device=values.device)
        return flat.index_copy(0, index, values[: len(index)]).view(-1, logits_to_keep)

    return scatter(out["logprob"]), scatter(out["entropy"]) if entropy else None


def _requests(
    input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
) -> tuple[list[Request], list[list[int]]]:
    """Rows with anything to score, and for each the places of its tokens in the flattened [B, logits_to_keep]."""
    requests: list[Request] = []
    columns: list[list[int]] = []
    split = input_ids.shape[1] - logits_to_keep
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
        prompt = tuple(t for t, m in zip(ids[:split], mask[:split], strict=True) if m)
        kept = [j for j in range(logits_to_keep) if mask[split + j]]
        if kept:
            requests.append(Request(prompt, tuple(ids[split + j] for j in kept)))
            columns.append([row * logits_to_keep + j for j in kept])
    return requests, columns
