"""A model's responses, for the judge and for whoever wants to read them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from cme.evaluation.generate import identity, sample
from cme.evaluation.options import Generation
from cme.evaluation.winrate.inputs import Prompt
from cme.files.atomic import write_text
from cme.options import ModelOptions


def responses_of(
    name: str,
    model: str,
    prompts: Sequence[Prompt],
    generation: Generation,
    model_options: Mapping[str, Any],
    folder: Path,
    progress: bool = True,
) -> dict[str, str]:
    """A model's responses by the prompts' ids. They are also written to `folder`/responses/NAME.jsonl.

    Args:
        name: what the model is called in the results.
        model: hub id, folder, or a model of the demo.
        model_options: for `cme.models.load_model`.
        folder: of the results; in its `journal` are the responses that are generated already, in a file for every
            model, set of prompts and way to generate.

    Raises:
        ModelError: the model can't be loaded.
        DatasetError: a prompt is too long for it.
    """
    logging.disable_progress_bar()
    models = ModelOptions(**model_options)
    asked = [prompt.prompt for prompt in prompts]
    key = [identity(model, asked, generation, models), [prompt.id for prompt in prompts]]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    file_name = re.sub(r"[^\w.-]", "_", name)
    found = sample(
        model,
        asked,
        generation,
        models,
        folder / "journal" / f"{file_name}-{digest}.jsonl",
        ids=[prompt.id for prompt in prompts],
        title=f"responses of {name}",
        progress=progress,
    )
    rows = [
        {
            "id": prompt.id,
            "prompt": prompt.prompt,
            "response": response.text.strip(),
            "finished": response.finished,
        }
        for prompt, response in zip(prompts, found, strict=True)
    ]
    (folder / "responses").mkdir(exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "responses" / f"{file_name}.jsonl", "".join(lines))
    return {prompt.id: response.text.strip() for prompt, response in zip(prompts, found, strict=True)}
