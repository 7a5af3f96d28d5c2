"""Models, dtypes and devices that there are not."""

import json
import pickle
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from cme.errors import ModelError, TemplateError
from cme.models import load_model
from cme.options import parse_chat_template_kwargs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float33"}, r"no dtype 'float33' for weights: give auto, float32, bfloat16"),
        ({"dtype": "int8"}, r"no dtype 'int8'"),
        ({"device": "gpu"}, r"(?s)device='gpu' is not possible here: .*Give a device such as 'cpu' or 'cuda:0'"),
        ({"device": "cuda:99"}, r"device='cuda:99' is not possible here"),
        ({"device": "meta"}, r"device='meta' is not possible here: it holds no values"),
        ({"device_map": "spread"}, r"(?s)device_map='spread' is not possible here: .*Give auto, balanced, "),
        ({"device_map": {"model": "disk", "lm_head": "cuda:99"}}, r"device_map='cuda:99' is not possible here"),
        (
            {"device_map": "auto", "max_memory": {"cpu": "lots"}},
            r"(?s)could not load the verifier '.*' with device_map='auto': .*lots.*Give another device_map",
        ),
    ],
)
def test_what_is_not_there_is_named_with_what_there_is(folder, options, message):
    with pytest.raises(ModelError, match=message):
        load_model(folder, "verifier", **options)


def test_variables_of_a_chat_template_are_json():
    assert parse_chat_template_kwargs(None, "X") == parse_chat_template_kwargs("", "X") == {}
    assert parse_chat_template_kwargs('{"a": false}', "X") == parse_chat_template_kwargs({"a": False}, "X")
    with pytest.raises(TemplateError, match=r"X '{a}' is not JSON: .*such as '{\"enable_thinking\": false}'"):
        parse_chat_template_kwargs("{a}", "X")
    with pytest.raises(TemplateError, match=r"X '\[1\]' is not a JSON object"):
        parse_chat_template_kwargs("[1]", "X")


@pytest.fixture
def own(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def cut(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def holding(content):
    return lambda file: file.write_text(content)


def with_settings(**settings):
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def as_pickle(file):
    torch.save({"model.norm.weight": Path("x")}, file.with_name("pytorch_model.bin"), pickle_module=pickle)
    file.unlink()


BROKEN = [
    *(("model.safetensors", cut(share)) for share in (0.0, 0.001, 0.3, 0.99)),
    ("model.safetensors", holding("not weights at all")),
    ("model.safetensors", as_pickle),
    *((name, holding(text)) for name in ("config.json", "tokenizer.json") for text in ("", "{", "[]", "{}", "3")),
    *((name, holding("null")) for name in ("config.json", "tokenizer.json")),
    *(("tokenizer.json", cut(share)) for share in (0.5, 0.99)),
    *(("tokenizer_config.json", holding(text)) for text in ("[]", "3", "{", '{"tokenizer_class": 3}')),
    *(
        ("config.json", with_settings(**{name: value}))
        for name in ("hidden_size", "vocab_size", "num_attention_heads", "intermediate_size")
        for value in (-1, 0, "many", None)
    ),
    *(("config.json", with_settings(num_hidden_layers=n)) for n in (-1, 0, 1, 3, 2.5)),
    ("config.json", with_settings(model_type="no-such-model")),
    ("config.json", with_settings(model_type=["llama"])),
    ("config.json", with_settings(rope_parameters=3)),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_is_broken_is_named_and_no_traceback(own, case):
    name, break_file = BROKEN[case]
    break_file(own / name)
    with pytest.raises(ModelError, match=rf"verifier '{own}'"):
        load_model(str(own), "verifier", device="cpu")


def test_running_out_of_memory_is_not_the_model_s_fault(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(folder, "verifier", device="cpu")


def test_a_classifier_with_tied_embeddings_is_no_language_model(own):
    config = tf.LlamaConfig(**tiny.SMALL, tie_word_embeddings=True)
    tf.LlamaForSequenceClassification(config).save_pretrained(own)
    with pytest.raises(ModelError, match=r"holds score\.weight, 1 weights in all"):
        load_model(str(own), "verifier", device="cpu")


@pytest.mark.parametrize(
    ("surplus", "refused"),
    [
        ("v_head.summary.weight", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("vision_tower.layers.0.weight", False),
        ("mtp.layers.0.weight", False),
        ("model.layers.2.mlp.up_proj.weight", True),
        ("model.layers.0.self_attn.q_proj.weight_scale", True),
        ("score.weight", True),
    ],
)
def test_weights_that_the_model_does_not_use_are_refused_but_for_the_harmless(own, surplus, refused):
    file = own / "model.safetensors"
    save_file({**load_file(file), surplus: torch.zeros(2, 2)}, file, {"format": "pt"})
    if not refused:
        assert load_model(str(own), "verifier", device="cpu")
    else:
        with pytest.raises(ModelError, match="the model has no place for"):
            load_model(str(own), "verifier", device="cpu")
