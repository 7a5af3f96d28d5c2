"""Fingerprints of verifiers: two that give other scores differ in them, whatever their names."""

from __future__ import annotations

import contextlib
import hashlib
import json

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from cme.engine.lm_head import input_device
from cme.errors import TemplateError
from cme.text.rendering import Renderer
from cme.verifier import Verifier

_PROBE = "What is the capital of France? naïve 日本語 🙂\n\n\tdef f(x): return 3.14 * x"


def fingerprint(verifier: Verifier) -> dict[str, str]:
    """Hashes of the weights, the config, and the tokenizer with its template; dtype and device, on which the last
    digits of scores depend."""
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
