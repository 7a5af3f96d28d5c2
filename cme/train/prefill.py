"""Each prompt encoded once: by a cache that is copied in sampling, by packs in the policy's log-probabilities."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from cme.engine.forward import score_batch
from cme.engine.packing import Batch, Request, empty_batch, pack


def add_shared_prefill(model: PreTrainedModel) -> None:
    """Let `model.generate` run each distinct row of `input_ids` through the model once, then copy its cache.

    The tokens drawn are those of the original `generate` up to rounding of the logits.
    """
    original: Callable[..., Any] = model.generate  # type: ignore[assignment]

    @functools.wraps(original)
    def generate(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if input_ids is None or attention_mask is None or not _fits(kwargs, self.generation_config):
            return original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        # Sharded weights are gathered in every forward pass, so ranks must make as many: those without copies, and
        # those whose prompts are one token, which leaves nothing to encode, too
        together = dist.is_initialized()
        if input_ids.shape[1] < 2:
            if together:
                _forward(self, input_ids, attention_mask)
            return original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        rows = torch.cat([input_ids, attention_mask], dim=1)
        distinct, index = rows.unique(dim=0, return_inverse=True)
        if len(distinct) < len(rows) or together:
            ids, mask = distinct.split(input_ids.shape[1], dim=1)
            cache = _prefill(self, ids, mask)
            cache.batch_select_indices(index)  # a copy for each row
            kwargs["past_key_values"] = cache
        return original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model.generate = types.MethodType(generate, model)  # type: ignore[assignment]


def _fits(kwargs: dict[str, Any], defaults: Any) -> bool:
    """True if `generate` will extend each row once, in a cache of the kind that `_prefill` makes."""
    if kwargs.keys() & {"past_key_values", "cache"}:
        return False
    sources = [kwargs, vars(kwargs.get("generation_config") or defaults), vars(defaults)]
    wanted = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "cache_implementation": None}
    found = {
        name: next((s[name] for s in sources if s.get(name) is not None), default)
        for name, default in wanted.items()
    }
    return found == wanted


def _prefill(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> DynamicCache:
    # The last prompt token is left to `generate`, which needs its logits
    return _forward(model, input_ids[:, :-1], attention_mask[:, :-1])


@torch.no_grad()
def _forward(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


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
