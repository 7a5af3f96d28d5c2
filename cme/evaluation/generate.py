"""Responses of a model to prompts, sampled or greedy, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cme.adapters import without_adapters
from cme.text.rendering import Messages, encode_prompt


@dataclass(frozen=True)
class Sampling:
    """How a model responds to prompts.

    Attributes:
        samples: completions per prompt.
        decoding: fields of transformers' GenerationConfig. The model's own are no part of it: what is left out has
            transformers' default.
        chat_template_kwargs: variables of the chat template.
    """

    samples: int
    max_new_tokens: int
    decoding: Mapping[str, Any] = field(default_factory=lambda: {"do_sample": True, "top_k": 0}, hash=False)
    batch_size: int = 64
    seed: int = 0
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)


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

    `greedy` takes the argmax of the logits, in place of `sampling.decoding`. Of the model's generation config only
    the EOS tokens count. Draws from torch's global generator: seed it, or fork it, around the call.
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
    ends = stop_token_ids(model, tokenizer)
    config = GenerationConfig(
        **{
            "max_new_tokens": sampling.max_new_tokens,
            "pad_token_id": pad,
            "eos_token_id": sorted(ends) or None,
            **({"do_sample": False} if greedy else sampling.decoding),
        }
    )
    with torch.no_grad(), _only(config, model):
        out = model.generate(  # type: ignore[operator]
            input_ids, attention_mask=attention_mask, generation_config=config
        )
    results = []
    for tokens in out[:, input_ids.shape[1] :].tolist():
        end = next((j for j, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        text = str(tokenizer.decode(kept, skip_special_tokens=True))
        results.append(Generated(text, len(kept), end is not None))
    return results


@contextmanager
def _only(config: GenerationConfig, model: Any) -> Iterator[None]:
    """Let `generate` take what its config leaves out from `config`, not from the model's own."""
    base: Any = without_adapters(model)
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens at which a response ends: the tokenizer's EOS, and those of the model's generation config."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
