"""Loading of a causal language model with its tokenizer, and the errors of one that can't be loaded."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cme.demo.models import local_path
from cme.errors import ModelError, is_out_of_memory
from cme.files.atomic import sha256

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate spreads a model over devices."""


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def default_dtype(device: torch.device) -> torch.dtype | str:
    """The checkpoint's own dtype on an accelerator ("auto"), float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else "auto"


_WHERE_MODELS_ARE = (
    "Give the id of a causal language model on the Hugging Face hub (and check the network), or a local folder "
    "that holds config.json, weights and tokenizer."
)


def load_model(
    name: str,
    role: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model `name` (hub id, local folder, or name of a demo's model) and its tokenizer, with finite weights.

    Args:
        role: of the model, for error messages: "verifier", "generator".
        dtype: of the weights, or its name; "auto" is the checkpoint's own, None is `default_dtype`.
        device: default the accelerator if there is one; not with `device_map`.
        kwargs: for `from_pretrained` of the model, such as `attn_implementation`, `revision`, or `device_map`,
            which spreads it over several devices, main memory ("cpu") and the disk ("disk", in `offload_folder`).
            `revision` and `trust_remote_code` go to the tokenizer too. A repository's own code runs only if the
            latter is True.

    Raises:
        ModelError: nothing is there under that name, or it is no causal language model, or its weights are
            incomplete, or more than it has, or hold NaN or infinities, or there is no such dtype or device.
    """
    device_map = kwargs.get("device_map")
    _check_devices(device, device_map)
    device = torch.device(device) if device is not None else default_device()
    dtype = default_dtype(device) if dtype is None else dtype
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ModelError(f"there is no dtype {dtype!r} for weights: give {', '.join(DTYPES)}")
    kwargs.setdefault("trust_remote_code", False)  # None would ask on the terminal
    config, tokenizer, (model, found) = _from_pretrained(name, role, dtype, kwargs)
    if config.get("is_encoder_decoder", False):
        raise ModelError(f"the {role} {name!r} is an encoder-decoder model: give a causal (decoder-only) one")
    _check_complete(found, name, role)
    check_finite(model, name, role)
    if device_map is None:
        model.to(device)
    return model, tokenizer


def _from_pretrained(
    name: str, role: str, dtype: torch.dtype | str, kwargs: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """The configuration, the tokenizer, and the model with transformers' loading info."""
    path, device_map = local_path(name), kwargs.get("device_map")
    shared = {option: kwargs[option] for option in ("revision", "trust_remote_code") if option in kwargs}
    part = "config.json"
    try:
        config = PreTrainedConfig.get_config_dict(path, **kwargs)[0]
        part = "tokenizer files"
        tokenizer = AutoTokenizer.from_pretrained(path, **shared)
        part = "config.json or weights"
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **kwargs)
    except Exception as error:  # whatever a library raises at a file that it was not written for
        if is_out_of_memory(error):
            raise
        how, remedy = "", _WHERE_MODELS_ARE
        if device_map is not None and not isinstance(error, OSError):
            how, remedy = f" with device_map={device_map!r}", "Give another device_map, or a device instead."
        elif Path(path).is_dir():
            remedy = f"If all of it is there, its {part} may be broken: download or save the model again."
        raise ModelError(f"could not load the {role} {name!r}{how}: {_cause(error)}\n{remedy}") from error
    return config, tokenizer, loaded


def without_adapters(model: Any) -> PreTrainedModel:
    """The base of a PEFT model, its adapters in it; any other model itself."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


_UNUSED = re.compile(
    r"rotary_emb\.inv_freq|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$"  # buffers of older versions
    r"|^v_head\.|^value_head\."  # a value head beside the language model
    r"|(^|\.)mtp\.|(^|\.)nextn\."  # layers that predict several tokens at once
    r"|vision|visual|image|audio|speech|multi_modal|mm_projector"  # towers of a multimodal model's text part
    r"|\.[kv]_scale$|rope_freqs"  # of a cache's numbers, and kept by GGUF files
)
"""Weights of a checkpoint that a language model does without. Which of its own it ignores, transformers knows."""


def _check_complete(found: Mapping[str, Any], name: str, role: str) -> None:
    """Raise ModelError if a checkpoint has other weights than the model: `found` is transformers' loading info."""
    missing = sorted(found["missing_keys"])  # transformers fills them with random numbers
    if missing:
        raise ModelError(
            f"the checkpoint of the {role} {name!r} lacks {', '.join(missing[:3])}: it was not saved from a "
            "causal language model, but from its body, or from a classifier or reward model on top of it; or its "
            "config.json is that of a larger one"
        )
    unused = sorted(key for key in found["unexpected_keys"] if not _UNUSED.search(key))
    if unused:
        raise ModelError(
            f"the checkpoint of the {role} {name!r} holds {', '.join(unused[:3])}, {len(unused)} weights in all, "
            "that the model has no place for: it was saved from a classifier or reward model, or its config.json "
            "is that of another model. Give a causal language model with its own config.json."
        )


def check_finite(model: PreTrainedModel, name: str, role: str) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    for parameter_name, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():  # meta: FSDP sends the values later
            raise ModelError(
                f"the {role} {name!r} has NaN or infinite values in {parameter_name}: its checkpoint is broken. "
                "Download it again, or give another checkpoint."
            )


def _check_devices(device: torch.device | str | None, device_map: Any) -> None:
    """Raise ValueError if both are given, ModelError if one of them names a device that is not here."""
    if device is not None and device_map is not None:
        raise ValueError(f"device={str(device)!r} and device_map={device_map!r} exclude each other: give one")
    if device is not None:
        _check_device(device, "device", "a device")
    is_mapping = isinstance(device_map, Mapping)
    for one in {*device_map.values()} - {"disk"} if is_mapping else {device_map} - {None, *DEVICE_MAPS}:
        _check_device(one, "device_map", f"{', '.join(DEVICE_MAPS)}, or a device")


def _check_device(device: torch.device | str, option: str, choices: str) -> None:
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:  # builds of torch for a CPU assert
        raise ModelError(
            f"{option}={str(device)!r} is not possible here: {_first_line(error)}\n"
            f"Give {choices} such as 'cpu' or 'cuda:0'."
        ) from error


def _cause(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to run it all the same
        return "torch refuses to read a file of weights, a pickle that may run code: convert it to safetensors"
    return f"{type(error).__name__}: {line}" if (line := _first_line(error)) != type(error).__name__ else line


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt")


def model_files(name: str) -> str | None:
    """SHA-256 of all weights, configuration and tokenizer files in a model's folder, so that a replaced checkpoint
    is known for another one; None for hub ids."""
    folder = Path(local_path(name))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _SUFFIXES:
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()
