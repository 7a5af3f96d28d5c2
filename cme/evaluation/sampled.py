"""Responses of a model, on disk batch by batch: a run that goes on generates nothing twice, and draws what one
that was not interrupted would have drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.errors import DatasetError
from cme.evaluation.generate import Generated, Sampling, generate
from cme.evaluation.options import Generation
from cme.files.partial import Chunk, Partial
from cme.fingerprint import model_files
from cme.text.rendering import Messages, encode_prompt, text_of
from cme.text.templates import PLAIN_TEMPLATE, PlainTemplate, standing_at

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
_SEEDS = 1_000_003
"""Between the seeds of two runs: more than one has batches."""


def identity(name: str, prompts: Sequence[str | Messages], generation: Generation) -> dict[str, Any]:
    """What responses depend on; of a model on the hub only its id."""
    return {
        "model": name,
        "model_files": model_files(name),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts), default=str).encode()).hexdigest(),
        **generation.settings(),
    }


def sample(
    name: str,
    prompts: Sequence[str | Messages],
    generation: Generation,
    load: Callable[[], Loaded],
    path: Path,
    *,
    ids: Sequence[str] | None = None,
    title: str = "responses",
    progress: bool = True,
) -> list[Generated]:
    """`generation.samples` responses to each prompt, in order: those that `path` holds, and the others generated.

    Args:
        name: hub id, folder, or a model of the demo.
        load: called if there is anything to generate.
        ids: of the prompts, for messages; their numbers if there are none.

    Raises:
        CMEError: `path` holds responses that were sampled otherwise, or the model can't be loaded.
        DatasetError: a prompt is too long for the model.
    """
    partial = Partial(path)
    header = identity(name, prompts, generation)
    partial.check(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    done, total = partial.start(header), len(prompts) * generation.samples
    if done < total:
        model, tokenizer = load()
        variables = {**standing_at(partial.began, tokenizer), **(generation.chat_template_kwargs or {})}
        generation = replace(generation, chat_template_kwargs=variables)
        asked, stop = rendered(prompts, tokenizer, generation.template)
        _check_lengths(model, tokenizer, asked, generation, name, ids)
        drafts = [prompt for prompt in asked for _ in range(generation.samples)]
        with tqdm(total=total, initial=done, desc=title, unit=" responses", disable=not progress) as bar:
            for start in range(done, total, generation.batch_size):
                batch = _batch(model, tokenizer, drafts[start : start + generation.batch_size], generation, start)
                partial.append(Chunk([asdict(_until(stop, response, tokenizer)) for response in batch]))
                bar.update(len(batch))
    return [Generated(**row) for chunk in partial.chunks() for row in chunk.rows if isinstance(row, dict)]


def rendered(
    prompts: Sequence[str | Messages], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[str | Messages], str | None]:
    """What the model gets for each prompt, and the text at which a response is over, if there is one."""
    if template == "chat" or (template == "auto" and tokenizer.chat_template):
        return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts], None
    plain = PlainTemplate(PLAIN_TEMPLATE if template == "auto" else template)
    # A pretrained model goes on with another question
    before = plain.text.partition("{prompt}")[0].strip()
    return [plain.prompt_text(text_of(p)) for p in prompts], f"\n{before}" if before else None


def _check_lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[str | Messages],
    generation: Generation,
    name: str,
    ids: Sequence[str] | None,
) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = generation.max_new_tokens
    for i, prompt in enumerate(asked):
        length = len(encode_prompt(tokenizer, prompt, generation.chat_template_kwargs))
        if context is not None and length + room > context:
            which = i + 1 if ids is None else repr(ids[i][:80])
            raise DatasetError(
                f"the prompt {which} has {length} tokens for {name}, which with --max-new-tokens {room} is more "
                f"than its context of {context}: lower the latter, or leave the prompt out"
            )


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    generation: Generation,
    start: int,
) -> list[Generated]:
    sampling = Sampling(
        samples=1,
        max_new_tokens=generation.max_new_tokens,
        decoding=generation.decoding,
        batch_size=len(prompts),
        chat_template_kwargs=generation.chat_template_kwargs,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generation.seed * _SEEDS + start)
        return generate(model, tokenizer, prompts, sampling)


def _until(stop: str | None, response: Generated, tokenizer: PreTrainedTokenizerBase) -> Generated:
    """Without what follows `stop`, nor the white space that a plain template has before a response."""
    if stop is None:
        return response
    text, found, _ = response.text.partition(stop)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"]) if found else response.length
    return Generated(text.strip(), length, response.finished or bool(found))
