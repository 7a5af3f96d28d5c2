"""The model to train. An adapter is put on its base, and trained further and saved as an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available

from cme.demo.models import local_path
from cme.errors import CMEError, ModelError, is_out_of_memory
from cme.models import load_model

_WHOLE_MODELS = ("model*.safetensors", "pytorch_model*.bin")


def load_policy(
    name: str, use_peft: bool, *, revision: str | None = None, **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model `name` and its tokenizer: a PreTrainedModel, or a PeftModel whose adapter takes gradients.

    Args:
        name: of a model or of a PEFT adapter, hub id or local folder.
        use_peft: a new adapter will be put on it.
        options: for `load_model`, and of an adapter for its base.

    Raises:
        ModelError: as `load_model` does, and for an adapter that does not fit its base.
        CMEError: an adapter on top of an adapter is asked for, or PEFT is not installed.
    """
    name = local_path(name)
    adapter = find_adapter_config_file(name, revision=revision)
    if (use_peft or adapter) and not is_peft_available():
        raise CMEError("adapters need PEFT: pip install peft, or leave --use-peft out")
    if adapter is None:
        return load_model(name, "generator", revision=revision, **options)
    if use_peft:
        raise CMEError(
            f"{name!r} is an adapter, and is trained further as it is: leave --use-peft out, or merge it into its "
            "base (merge_and_unload) to train a new one"
        )
    return _load_adapter(name, revision, options)


def _load_adapter(name: str, revision: str | None, options: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase]:
    from peft import PeftConfig, PeftModel

    # A config.json alone may be the base's
    if any(file for pattern in _WHOLE_MODELS for file in Path(name).glob(pattern)):
        raise ModelError(f"{name!r} holds a model and an adapter: give a folder with one of them")
    with _naming(name):
        config = PeftConfig.from_pretrained(name, revision=revision)
        base_name = str(config.base_model_name_or_path)
    base, tokenizer = load_model(base_name, "generator's base", revision=config.revision, **options)
    with _naming(name), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # random numbers would take their place
        model = PeftModel.from_pretrained(base, name, is_trainable=True, revision=revision)
        own = cached_file(
            name, TOKENIZER_CONFIG_FILE, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return model, AutoTokenizer.from_pretrained(name, revision=revision) if own else tokenizer


@contextmanager
def _naming(adapter: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"could not load the adapter {adapter!r}: {error}") from error
