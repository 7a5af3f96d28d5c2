"""Fingerprints of models: what tells one from another that has the same name."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from cme.demo.models import local_path
from cme.engine.lm_head import input_device
from cme.errors import TemplateError
from cme.files.atomic import sha256
from cme.text.rendering import Renderer
from cme.verifier import Verifier

_PROBE = "What is the capital of France? naïve 日本語 🙂\n\n\tdef f(x): return 3.14 * x"


def fingerprint(verifier: Verifier) -> dict[str, str]:
    """Of its weights, of its tokenizer and template, and of what else the last digits of scores depend on."""
    model = verifier.model
    devices = {p.device.type for p in model.parameters() if not p.is_meta} | {input_device(model).type}
    return {
        "weights_sha256": _of_weights(model),
        "config": _of_config(model),
        "rendering": _of_rendering(verifier.renderer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": "+".join(sorted(devices)),
    }


def _of_weights(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for module_name, module in model.named_modules():
        with align_module_device(module):  # fetches what `device_map` keeps in main memory or on the disk
            tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, parameter in tensors:  # quantised weights are buffers
                digest.update(f"{module_name}.{name} {tuple(parameter.shape)} ".encode())
                if parameter.is_meta:
                    continue
                flat = parameter.detach().flatten().contiguous().cpu()
                digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _of_config(model: PreTrainedModel) -> str:
    settings = model.config.to_diff_dict()
    for of_the_file in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        settings.pop(of_the_file, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _of_rendering(renderer: Renderer) -> str:
    identity = {**renderer.identity(), "ids": renderer.tokenizer(_PROBE)["input_ids"]}
    with contextlib.suppress(TemplateError):  # it is made for other conversations
        identity["prompt"] = renderer.prompt_ids(_PROBE)  # in which some templates write the date
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


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
