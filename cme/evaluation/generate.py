"""Responses of a model to prompts, sampled or greedy, in batches; kept on disk, where a run may be interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cme.errors import CMEError, DatasetError
from cme.evaluation.options import Generation
from cme.files.partial import Partial
from cme.models import load_model, model_files, without_adapters
from cme.options import ModelOptions
from cme.text.messages import Messages, text_of
from cme.text.rendering import encode_prompt
from cme.text.templates import PLAIN_TEMPLATE, PlainTemplate, standing_at

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Sampling:
    """Settings of responses to prompts.

    Attributes:
        samples: responses per prompt.
        max_new_tokens: most tokens of a response.
        batch_size: responses that are generated together.
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
    # Llama 3 has no padding token. Any does: it is masked in prompts, and cut off after an end
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


@contextmanager
def seeded(seed: int, model: PreTrainedModel) -> Iterator[None]:
    """Random numbers that depend on `seed` alone; afterwards torch's global generators are as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens at which a response ends: the tokenizer's EOS, and those of the model's generation config."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


_SEEDS = 1_000_003
"""Between the seeds of two runs: more than one has batches."""


def sample(
    name: str,
    prompts: Sequence[str | Messages],
    generation: Generation,
    models: ModelOptions,
    path: Path,
    *,
    load: Callable[[], Loaded] | None = None,
    ids: Sequence[str] | None = None,
    header: Mapping[str, Any] | None = None,
    title: str = "responses",
    progress: bool = True,
) -> list[Generated]:
    """`generation.samples` responses to each prompt, in order: those that `path` holds, and the others generated.

    Each batch is on disk before the next, and has a seed of its own, so that a run that was interrupted draws what
    one that was not would have drawn.

    Args:
        name: hub id, folder, or a model of the demo.
        load: the model, in place of loading it; called if there is anything to generate.
        ids: of the prompts, for messages; their numbers if there are none.
        header: their `identity`, which hashes the model's files, if it is known already.

    Raises:
        CMEError: `path` holds responses that were sampled otherwise, or the model can't be loaded.
        DatasetError: a prompt is too long for the model.
    """
    partial, header = Partial(path), header or identity(name, prompts, generation, models)
    partial.check(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    done, total = partial.start(header), len(prompts) * generation.samples
    if done < total:
        model, tokenizer = load_model(name, "generator", **models.kwargs()) if load is None else load()
        variables = {**standing_at(partial.began, tokenizer), **generation.chat_template_kwargs}
        asked, stop = rendered(prompts, tokenizer, generation.template)
        sampling = Sampling(
            samples=1,
            max_new_tokens=generation.max_new_tokens,
            decoding=generation.decoding,
            batch_size=generation.batch_size,
            chat_template_kwargs=variables,
        )
        _check_lengths(model, tokenizer, asked, sampling, name, ids)
        drafts = [prompt for prompt in asked for _ in range(generation.samples)]
        with tqdm(total=total, initial=done, desc=title, unit=" responses", disable=not progress) as bar:
            for start in range(done, total, sampling.batch_size):
                part = drafts[start : start + sampling.batch_size]
                with seeded(generation.seed * _SEEDS + start, model):
                    batch = generate(model, tokenizer, part, sampling)
                partial.append([asdict(_until(stop, response, tokenizer)) for response in batch])
                bar.update(len(batch))
    return [Generated(*(row[name] for name in _KINDS)) for row in read_rows(partial, _KINDS, total)]


_KINDS = {"text": str, "length": int, "finished": bool}


def read_rows(partial: Partial, kinds: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    """The rows of a journal. Raises CMEError if there are more than `most`, or if one is not an object with values
    of these kinds, which are types by name."""
    rows = list(partial.rows())
    if len(rows) > most or not all(_fits(row, kinds) for row in rows):
        raise CMEError(f"{partial.path} is damaged: delete it to start anew")
    return rows


def _fits(row: Any, kinds: Mapping[str, Any]) -> bool:
    if not isinstance(row, dict) or not row.keys() >= kinds.keys():
        return False
    return all(isinstance(row[name], kind) for name, kind in kinds.items())


def identity(
    name: str, prompts: Sequence[str | Messages], generation: Generation, models: ModelOptions
) -> dict[str, Any]:
    """The settings and files that responses depend on; of a model on the hub only its id."""
    return {
        "model": name,
        "model_files": model_files(name),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts), default=str).encode()).hexdigest(),
        **generation.settings(),
        "dtype": models.dtype,
    }


def rendered(
    prompts: Sequence[str | Messages], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[str | Messages], str | None]:
    """The input of the model for each prompt, and the text at which a response is over, if there is one."""
    if template == "chat" or (template == "auto" and tokenizer.chat_template):
        return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts], None
    plain = PlainTemplate(PLAIN_TEMPLATE if template == "auto" else template)
    # A pretrained model continues with another question
    before = plain.text.partition("{prompt}")[0].strip()
    return [plain.prompt_text(text_of(p)) for p in prompts], f"\n{before}" if before else None


def _check_lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[str | Messages],
    sampling: Sampling,
    name: str,
    ids: Sequence[str] | None,
) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = sampling.max_new_tokens
    for i, prompt in enumerate(asked):
        length = len(encode_prompt(tokenizer, prompt, sampling.chat_template_kwargs))
        if context is not None and length + limit > context:
            which = i + 1 if ids is None else repr(ids[i][:80])
            raise DatasetError(
                f"the prompt {which} has {length} tokens for {name}, which with --max-new-tokens {limit} is more "
                f"than its context of {context}: lower the latter, or leave the prompt out"
            )


def _until(stop: str | None, response: Generated, tokenizer: PreTrainedTokenizerBase) -> Generated:
    """Without what follows `stop`, nor the white space that a plain template has before a response."""
    if stop is None:
        return response
    text, found, _ = response.text.partition(stop)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"]) if found else response.length
    return Generated(text.strip(), length, response.finished or bool(found))
