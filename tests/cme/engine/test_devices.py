"""Verifiers in half precision, and spread over devices; main memory and the disk stand in for more GPUs."""

import accelerate
import pytest
import tiny
import torch
from packaging.version import Version

from cme.verifier import Verifier

PROMPTS = ["What is the capital of France?"] * 2 + ["Where?"]
RESPONSES = ["Paris.", "The capital of France is Paris.", "Here, I think!"]
LAYERS = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
MAPS = {
    "one device": {"": "cpu"},
    "layers on disk": {**LAYERS, "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"},
    "head on disk": {**LAYERS, "model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "disk"},
    "all on disk": {"model": "disk", "lm_head": "disk"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def logprobs(verifier):
    return torch.cat([score.tokens.logprob for score in verifier.score(PROMPTS, RESPONSES)])


@pytest.mark.parametrize("where", MAPS)
def test_a_model_spread_over_devices_scores_the_same(where, folder, tmp_path):
    if where == "all on disk" and Version(accelerate.__version__) < Version("1.15"):
        pytest.skip("accelerate 1.10 refuses to leave a whole model on the disk")
    spread = Verifier.from_pretrained(str(folder), device_map=MAPS[where], offload_folder=str(tmp_path))
    offloaded = [name for name, p in spread.model.named_parameters() if p.is_meta]
    assert bool(offloaded) == ("disk" in where)
    assert spread.packed
    torch.testing.assert_close(logprobs(spread), logprobs(Verifier.from_pretrained(str(folder), device="cpu")))
    assert [name for name, p in spread.model.named_parameters() if p.is_meta] == offloaded


def test_a_device_and_a_device_map_exclude_each_other(folder):
    with pytest.raises(ValueError, match="exclude each other"):
        Verifier.from_pretrained(str(folder), device="cpu", device_map="auto")


def plain(verifier):
    """From the logits of one sequence at a time, by the model's own code."""
    verifier.model.set_attn_implementation("eager")
    values = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        before, after = verifier.renderer.prompt_ids(prompt), verifier.renderer.response_ids(response)
        with torch.no_grad():
            logits = verifier.model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
        values.append(logits.float().log_softmax(-1).gather(1, torch.tensor(after)[:, None])[:, 0])
    return torch.cat(values)


def test_a_verifier_in_bfloat16_is_no_further_off_than_the_model_itself(folder):
    exact = logprobs(Verifier.from_pretrained(str(folder), device="cpu"))
    half = Verifier.from_pretrained(str(folder), device="cpu", dtype="bfloat16")
    assert half.packed
    assert half.model.dtype == torch.bfloat16
    ours = logprobs(half)
    assert ours.dtype == torch.float32
    error, usual = (ours - exact).square().mean().sqrt(), (plain(half) - exact).square().mean().sqrt()
    assert 1e-3 < error < 1.3 * usual
