"""Load a causal language model and its tokenizer, or say why not."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cme.errors import ModelError


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def default_dtype(device: torch.device) -> torch.dtype | str:
    """The checkpoint's own dtype on an accelerator ("auto"), float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else "auto"


def load_model(
    name: str,
    role: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model `name` (hub id or local folder) and its tokenizer, with finite weights.

    Args:
        role: what the model is for, as error messages put it: "verifier", "generator".
        dtype: of the weights; None is `default_dtype`.
        device: default the accelerator if there is one; not with `device_map`.
        kwargs: for `from_pretrained` of the model, such as `attn_implementation`, `revision`, or `device_map`,
            which spreads it over several devices, main memory ("cpu") and the disk ("disk", in `offload_folder`).
            `revision` and `trust_remote_code` go to the tokenizer too. A repository's own code runs only if the
            latter is True.

    Raises:
        ModelError: nothing is there under that name, or it is no causal language model, or its weights are
            incomplete or hold NaN or infinities.
    """
    spread = kwargs.get("device_map") is not None
    if spread and device is not None:
        raise ValueError(
            f"device={str(device)!r} and device_map={kwargs['device_map']!r} exclude each other: give one"
        )
    device = torch.device(device) if device is not None else default_device()
    dtype = default_dtype(device) if dtype is None else dtype
    kwargs.setdefault("trust_remote_code", False)  # None would ask on the terminal
    shared = {option: kwargs[option] for option in ("revision", "trust_remote_code") if option in kwargs}
    try:
        encoder_decoder = PreTrainedConfig.get_config_dict(name, **kwargs)[0].get("is_encoder_decoder", False)
        tokenizer = AutoTokenizer.from_pretrained(name, **shared)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"could not load the {role} {name!r}: {_first_line(error)}\n"
            "Give the id of a causal language model on the Hugging Face hub (and check the network), or a local "
            "folder that holds config.json, weights and tokenizer."
        ) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])  # transformers fills them with random numbers
    if encoder_decoder:
        raise ModelError(f"the {role} {name!r} is an encoder-decoder model: give a causal (decoder-only) one")
    if missing:
        raise ModelError(
            f"the checkpoint of the {role} {name!r} lacks {', '.join(missing[:3])}: it was not saved from a "
            "causal language model, but from its body, or from a classifier or reward model on top of it"
        )
    check_finite(model, name, role)
    if not spread:
        model.to(device)  # type: ignore[arg-type]  # its decorator hides the signature of nn.Module.to
    return model, tokenizer


def check_finite(model: PreTrainedModel, name: str, role: str) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    for parameter_name, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():  # meta: FSDP sends the values later
            raise ModelError(
                f"the {role} {name!r} has NaN or infinite values in {parameter_name}: its checkpoint is broken. "
                "Download it again, or give another checkpoint."
            )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
