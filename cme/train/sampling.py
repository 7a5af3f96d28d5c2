"""Sampling several completions of a prompt with its encoding computed once."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


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
    """Whether `generate` will extend each row once, in a cache of the kind that `_prefill` makes."""
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
