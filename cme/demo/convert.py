"""Conversion of a GGUF checkpoint to a folder that `from_pretrained` reads in a second."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path


def convert(gguf: Path, out: Path) -> None:
    """Save the model and the tokenizer of the file `gguf` into the folder `out`, in bfloat16.

    Tensors are dequantised and rounded once to bfloat16, the type both models were published in.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        settings = loaded.config.to_dict()
        for key in ("quantization_config", "_model_name_or_path"):
            settings.pop(key, None)
        config = type(loaded.config).from_dict(settings)
        # transformers refuses to save a model that was read from GGUF, so its weights move into a plain one
        with torch.device("meta"):
            plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(out)
    # safetensors files are written for their owner only, but a cache may be shared
    for weights in out.glob("*.safetensors"):
        shutil.copymode(out / "config.json", weights)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the bar over dequantised tensors heeds no setting
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
