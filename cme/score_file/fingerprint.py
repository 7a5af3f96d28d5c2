"""What tells one verifier from another that has the same name."""

from __future__ import annotations

import hashlib

import torch

from cme.verifier import Verifier

_VALUES = 256
"""Weights a parameter that are looked at, spread over it: training changes nearly all of them."""

_PROBE = "What is the capital of France? naïve 日本語 🙂\n\n\tdef f(x): return 3.14 * x"


def fingerprint(verifier: Verifier) -> dict[str, str]:
    """Of its weights, its tokenizer with the template, and of what else the last digits of scores depend on."""
    weights = hashlib.sha256()
    for name, parameter in verifier.model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // _VALUES)].contiguous().cpu()
        weights.update(name.encode())
        weights.update(sample.view(torch.uint8).numpy().tobytes())
    renderer = verifier.renderer
    ids = [*renderer.prompt_ids(_PROBE), *renderer.response_ids(_PROBE)]
    return {
        "weights": weights.hexdigest(),
        "rendering": hashlib.sha256(repr(ids).encode()).hexdigest(),
        "dtype": str(verifier.model.dtype).removeprefix("torch."),
        "device": verifier.model.device.type,
    }
