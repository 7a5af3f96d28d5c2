"""Responses of a model, on disk batch by batch: a run that goes on generates nothing twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cme.demo.models import local_path
from cme.errors import DatasetError
from cme.evaluation.fingerprint import fingerprint
from cme.evaluation.generate import Generated, Sampling, generate
from cme.evaluation.winrate.inputs import Prompt
from cme.evaluation.winrate.options import Generation
from cme.loading import load_model
from cme.rendering import PLAIN_TEMPLATE, Messages, encode_prompt, text_of


def responses_of(
    name: str, prompts: Sequence[Prompt], generation: Generation, folder: Path, progress: bool = True
) -> dict[str, str]:
    """A model's responses by the prompts' ids: those that `folder` has, and the others generated.

    Args:
        name: hub id, folder, or a model of the demo.

    Raises:
        ModelError: it can't be loaded.
        DatasetError: a prompt is too long for it.
    """
    path = local_path(name)
    file = folder / f"{_short(name)}-{_identity(name, path, prompts, generation)[:12]}.jsonl"
    rows = _whole_batches(file, generation.batch_size, len(prompts))
    if len(rows) < len(prompts):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(map(_line, rows)), encoding="utf-8")
        logging.disable_progress_bar()
        model, tokenizer = load_model(path, "model", **generation.model_options)
        texts, stop = _rendered(prompts, tokenizer, generation.template)
        _check_lengths(model, tokenizer, prompts, texts, generation, name)
        title = f"responses of {_short(name)}"
        with tqdm(total=len(prompts), initial=len(rows), desc=title, unit="", disable=not progress) as bar:
            size = generation.batch_size
            for start in range(len(rows), len(prompts), size):
                responses = _batch(model, tokenizer, texts[start : start + size], generation, start // size)
                new = [
                    _as_row(prompt, response, stop)
                    for prompt, response in zip(prompts[start : start + size], responses, strict=True)
                ]
                with file.open("a", encoding="utf-8") as out:
                    out.write("".join(map(_line, new)))
                rows += new
                bar.update(len(new))
    return {row["id"]: row["response"] for row in rows}


def _identity(name: str, path: str, prompts: Sequence[Prompt], generation: Generation) -> str:
    parts = {
        "model": name,
        "files": fingerprint(path),
        "prompts": [[prompt.id, prompt.prompt] for prompt in prompts],
        "generation": generation.settings(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _whole_batches(file: Path, batch_size: int, total: int) -> list[dict[str, Any]]:
    """What an earlier run has finished. A batch that a kill cut off is generated again, with the same seed."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return rows if len(rows) == total else rows[: len(rows) // batch_size * batch_size]


def _rendered(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[str | Messages], str | None]:
    """What the model gets for each prompt, and the text with which a response is over."""
    if template == "chat" or (template == "auto" and tokenizer.chat_template):
        return [
            [{"role": "user", "content": p.prompt}] if isinstance(p.prompt, str) else p.prompt for p in prompts
        ], None
    before, found, after = (PLAIN_TEMPLATE if template == "auto" else template).partition("{prompt}")
    if not found or not after.endswith("{response}"):
        raise DatasetError(f"the template {template!r} must hold {{prompt}} and end with {{response}}")
    after = after.removesuffix("{response}").rstrip()
    # A pretrained model goes on with another question
    stop = f"\n{before.strip()}" if before.strip() else None
    return [before + text_of(p.prompt) + after for p in prompts], stop


def _check_lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    texts: Sequence[str | Messages],
    generation: Generation,
    name: str,
) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = generation.max_new_tokens
    for prompt, text in zip(prompts, texts, strict=True):
        length = len(encode_prompt(tokenizer, text))
        if context is not None and length + room > context:
            raise DatasetError(
                f"the prompt {prompt.id[:80]!r} has {length} tokens for {name}, which with --max-new-tokens "
                f"{room} is more than its context of {context}: lower the latter, or leave the prompt out"
            )


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Messages],
    generation: Generation,
    number: int,
) -> list[Generated]:
    sampling = Sampling(
        samples=1,
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        batch_size=generation.batch_size,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generation.seed + number)
        return generate(model, tokenizer, texts, sampling, greedy=generation.greedy)


def _as_row(prompt: Prompt, response: Generated, stop: str | None) -> dict[str, Any]:
    text, found, _ = response.text.partition(stop) if stop else (response.text, "", "")
    return {
        "id": prompt.id,
        "prompt": prompt.prompt,
        "response": text.strip(),
        "finished": response.finished or bool(found),
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _short(name: str) -> str:
    return Path(name).name or name
