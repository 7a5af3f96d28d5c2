"""Models, dtypes and devices that there are not."""

import pytest
import tiny

from cme.errors import ModelError, TemplateError
from cme.loading import load_model, parse_chat_template_kwargs


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


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_broken_download_is_named(tmp_path, share):
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    with pytest.raises(ModelError, match="could not load the verifier"):
        load_model(str(tmp_path), "verifier")
