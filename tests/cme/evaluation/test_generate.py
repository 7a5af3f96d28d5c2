"""Responses in batches: decoded as asked, whatever the model's generation config and the tokenizer say."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper

from cme.errors import CMEError
from cme.evaluation.generate import Generated, Sampling, generate, identity, sample
from cme.evaluation.options import Generation
from cme.files.partial import Partial
from cme.options import ModelOptions

PROMPTS = ["What is the capital of France?", "What?", "The capital of France is Paris. Question: What is"]
LENGTH = 8
KEPT = {"text": "Paris", "length": 2, "finished": True}
ENDS = [2, *range(4, 44)]  # many, so that a response ends now and then

LEAKS = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(4, 200)),
    "begin_suppress_tokens": list(range(4, 200)),
    "forced_eos_token_id": 2,
    "bad_words_ids": [[token] for token in range(4, 200)],
    "sequence_bias": [[[7], 50.0]],
    "exponential_decay_length_penalty": (2, 5.0),
    "min_new_tokens": LENGTH,
    "min_length": 60,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0},
    "num_beams": 3,
    "return_dict_in_generate": True,
    "stop_strings": ["a"],
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
}


def leaking(name):
    """A model with a field of `LEAKS` in its generation config."""
    model = tiny.llama()
    model.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=3, **{name: LEAKS[name]})
    return model


def decode(model, prompt, copies, choose):
    """Tokens [copies, LENGTH] by a plain loop over whole passes; `choose` takes ids and logits [copies, V]."""
    ids = torch.tensor(tiny.tokenizer()(prompt)["input_ids"]).repeat(copies, 1)
    start = ids.shape[1]
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        ids = torch.cat([ids, choose(ids, logits).unsqueeze(1)], dim=1)
        if torch.isin(ids[:, start:], torch.tensor(ENDS)).any(1).all():
            break
    rows = ids[:, start:].tolist()
    ends = [next((j for j, token in enumerate(row) if token in ENDS), LENGTH) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def draw(ids, logits):
    for warper in (TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)):
        logits = warper(ids, logits)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(1)


def assert_responses(responses, tokens):
    texts = [tiny.tokenizer().decode(row, skip_special_tokens=True) for row in tokens]
    assert [(r.text, r.length, r.finished) for r in responses] == [
        (text, len(row), row[-1] in ENDS) for text, row in zip(texts, tokens, strict=True)
    ]


@pytest.mark.parametrize("name", LEAKS)
def test_the_models_generation_config_changes_nothing(name):
    model = leaking(name)
    own = copy.deepcopy(model.generation_config)
    decoding = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "min_p": 0.01}
    sampling = Sampling(samples=1, max_new_tokens=LENGTH, decoding=decoding)

    responses = generate(model, tiny.tokenizer(), PROMPTS, sampling, greedy=True)
    assert_responses(responses, [decode(model, p, 1, lambda _, logits: logits.argmax(-1))[0] for p in PROMPTS])
    torch.manual_seed(1)
    responses = generate(model, tiny.tokenizer(), [PROMPTS[0]] * 8, sampling)
    torch.manual_seed(1)
    assert_responses(responses, decode(model, PROMPTS[0], 8, draw))
    assert {response.finished for response in responses} == {True, False}
    assert model.generation_config.to_dict() == own.to_dict()


def test_nor_does_that_of_a_model_with_an_adapter():
    model = get_peft_model(leaking("repetition_penalty"), LoraConfig(target_modules=["q_proj"]))
    sampling = Sampling(samples=1, max_new_tokens=LENGTH, decoding={"do_sample": False})
    responses = generate(model, tiny.tokenizer(), PROMPTS, sampling)
    assert_responses(responses, [decode(model, p, 1, lambda _, logits: logits.argmax(-1))[0] for p in PROMPTS])
    assert model.generation_config.repetition_penalty == LEAKS["repetition_penalty"]


@pytest.mark.parametrize(
    "rows",
    [["x"], [None], [{"text": "a", "length": 1}], [{"text": "a", "length": "1", "finished": True}], [KEPT] * 3],
    ids=["text", "null", "missing key", "text for a number", "too many"],
)
def test_kept_responses_of_another_form_are_damaged(tiny_models, tmp_path, rows):
    path, models = tmp_path / "journal.jsonl", ModelOptions()
    header = identity(tiny_models["generator"], PROMPTS[:2], Generation(), models)
    Partial(path).start(header)

    def kept():
        return sample(tiny_models["generator"], PROMPTS[:2], Generation(), models, path, load=None, progress=False)

    Partial(path).append([KEPT] * 2)
    assert kept() == [Generated(**KEPT)] * 2
    path.unlink()
    Partial(path).start(header)
    Partial(path).append([*rows, KEPT])
    with pytest.raises(CMEError, match=r"journal.jsonl is damaged: delete it to start anew"):
        kept()


@pytest.mark.parametrize("special", [("pad_token",), ("pad_token", "eos_token")])
def test_a_tokenizer_needs_no_padding_token(special):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    wanted = [
        generate(model, tokenizer, [p], Sampling(samples=1, max_new_tokens=8), greedy=True)[0] for p in PROMPTS
    ]
    for name in special:
        setattr(tokenizer, name, None)
    assert generate(model, tokenizer, PROMPTS, Sampling(samples=1, max_new_tokens=8), greedy=True) == wanted
    assert len({response.text for response in wanted}) == 3
