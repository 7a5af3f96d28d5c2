"""What tells one model from another that is called the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCKS, _BLOCK_BYTES = 256, 4096
"""What is read of a file of weights, spread over it: training changes nearly all of them."""


def fingerprint(path: str) -> str | None:
    """Of what a model's folder holds, so that a checkpoint that was replaced is known for another one; None for
    hub ids."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model"):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as data:
                step = max(_BLOCK_BYTES, file.stat().st_size // _BLOCKS)
                for start in range(0, file.stat().st_size, step):
                    data.seek(start)
                    digest.update(data.read(_BLOCK_BYTES))
    return digest.hexdigest()
