"""What tells one model from another that is called the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cme.files import sha256

_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt")


def fingerprint(path: str) -> str | None:
    """Of every byte that a model's folder holds of weights, configuration and tokenizer, so that a checkpoint that
    was replaced is known for another one; None for hub ids."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _SUFFIXES:
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()
