"""Responses of a model to prompts, sampled or greedy, in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.rendering import Messages, encode_prompt


@dataclass(frozen=True)
class Sampling:
    """How to sample: completions a prompt, the settings of `generate`, and variables of the chat template."""

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    seed: int = 0
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def generate_options(self, greedy: bool) -> dict[str, Any]:
        if greedy:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True)
class Generated:
    """A response.

    Attributes:
        text: without special tokens.
        length: tokens of the generator, the end-of-turn token included.
        finished: ended by itself within the length limit.
    """

    text: str
    length: int
    finished: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    sampling: Sampling,
    *,
    greedy: bool = False,
    bar: tqdm[Any] | None = None,
) -> list[Generated]:
    """One response to each prompt, in order; a prompt that comes k times gets k. `bar` advances by responses.

    Draws from torch's global generator: seed it, or fork it, around the call.
    """
    responses: list[Generated] = []
    for start in range(0, len(prompts), sampling.batch_size):
        part = prompts[start : start + sampling.batch_size]
        responses += _generate_batch(model, tokenizer, part, sampling, greedy)
        if bar is not None:
            bar.update(len(part))
    return responses


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    sampling: Sampling,
    greedy: bool,
) -> list[Generated]:
    # Llama 3 has no padding token; any does, where attention is masked and what follows an end is cut off
    pad = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
    ids = [
        torch.tensor(encode_prompt(tokenizer, p, sampling.chat_template_kwargs), dtype=torch.long) for p in prompts
    ]
    mask = [torch.ones_like(row) for row in ids]
    input_ids, attention_mask = (
        pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left").to(model.device)
        for rows, value in ((ids, pad), (mask, 0))
    )
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            **sampling.generate_options(greedy),
        )
    ends = stop_token_ids(model, tokenizer)
    results = []
    for tokens in out[:, input_ids.shape[1] :].tolist():
        end = next((j for j, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        text = str(tokenizer.decode(kept, skip_special_tokens=True))
        results.append(Generated(text, len(kept), end is not None))
    return results


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens at which a response ends: the tokenizer's EOS, and those of the model's generation config."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
