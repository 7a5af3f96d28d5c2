"""Scores of a verifier against the definition: one unpadded forward pass a response, with the model's own head."""

import copy
import math

import pytest
import tiny
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cme.attention import AttentionPlan, Cascade
from cme.errors import ModelError
from cme.lm_head import LMHead, UnsupportedModelError
from cme.packing import Request
from cme.scoring import score_requests
from cme.verifier import Verifier

S = tiny.SMALL
WINDOW = {"sliding_window": 6}
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
FAMILIES = {
    "llama": (LlamaConfig(**S), LlamaForCausalLM),
    "llama-tied-bias": (LlamaConfig(**S, tie_word_embeddings=True, attention_bias=True), LlamaForCausalLM),
    "qwen2": (Qwen2Config(**S), Qwen2ForCausalLM),
    "qwen3": (Qwen3Config(**S, head_dim=16), Qwen3ForCausalLM),
    "gemma2": (Gemma2Config(**S, **WINDOW, head_dim=16, final_logit_softcapping=5.0), Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig(**S, **WINDOW, head_dim=16), Gemma3ForCausalLM),
    "olmo2": (Olmo2Config(**S), Olmo2ForCausalLM),
    "olmo3": (Olmo3Config(**S, **WINDOW), Olmo3ForCausalLM),
    "cohere": (CohereConfig(**S, logit_scale=0.3), CohereForCausalLM),
    "granite": (GraniteConfig(**S, logits_scaling=4.0), GraniteForCausalLM),
    "gpt2": (GPT2Config(**GPT2), GPT2LMHeadModel),
    "gpt-oss": (
        GptOssConfig(**S, **WINDOW, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
        GptOssForCausalLM,
    ),
}
PROMPTS = ["What is the capital of France?"] * 3 + ["Where?"] * 2
RESPONSES = ["Paris.", "The capital of France is Paris.", "no idea", "Here!", "In the north, I think."]


def plain_logprobs(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    return torch.stack([logits[len(prompt) - 1 + j, token] for j, token in enumerate(response)])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_are_those_of_plain_forward_passes(family):
    config, model_class = FAMILIES[family]
    model = tiny.build(copy.deepcopy(config), model_class)
    eager = tiny.build(copy.deepcopy(config), model_class)
    eager.set_attn_implementation("eager")
    verifier = Verifier.of(model, tiny.tokenizer())
    assert verifier.packed
    scores = verifier.score(PROMPTS, RESPONSES, stats=("entropy",))
    for prompt, score in zip(PROMPTS, scores, strict=True):
        ids = verifier.renderer.prompt_ids(prompt)
        want = plain_logprobs(eager, ids, score.token_ids)
        torch.testing.assert_close(score.tokens.logprob.double(), want, rtol=0, atol=2e-5)
        assert score.mean_logprob == pytest.approx(float(want.mean()), abs=1e-5)


def test_a_model_that_cannot_be_packed_is_padded_and_agrees():
    config = MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, state_size=8, initializer_range=0.3)
    model = tiny.build(config, MambaForCausalLM)
    with pytest.warns(UserWarning, match="right-padded batches"):
        verifier = Verifier.of(model, tiny.tokenizer())
    assert not verifier.packed
    for prompt, score in zip(PROMPTS, verifier.score(PROMPTS, RESPONSES), strict=True):
        want = plain_logprobs(model, verifier.renderer.prompt_ids(prompt), score.token_ids)
        torch.testing.assert_close(score.tokens.logprob.double(), want, rtol=0, atol=2e-5)


def own_only(segments):
    return tuple((s.start, 1, s.length) for s in segments)


def test_a_wrong_mask_fails_the_self_check(monkeypatch):
    # No response sees its prompt
    monkeypatch.setattr(AttentionPlan, "cascade", property(lambda self: Cascade(own_only(self.segments), ())))
    with pytest.warns(UserWarning, match="differs from the plain forward pass"):
        assert not Verifier.of(tiny.llama(), tiny.tokenizer()).packed


def test_scores_do_not_depend_on_the_batch_or_the_order():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer(), max_batch_tokens=20)
    together = verifier.score(PROMPTS, RESPONSES)
    for i in range(len(PROMPTS)):
        alone = verifier.score([PROMPTS[i]], [RESPONSES[i]])[0]
        assert alone.mean_logprob == pytest.approx(together[i].mean_logprob, abs=1e-5)


def test_equal_requests_are_computed_once(monkeypatch):
    import cme.scoring

    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    rows = []
    original = cme.scoring.score_batch
    monkeypatch.setattr(
        cme.scoring, "score_batch", lambda m, batch, *a: rows.append(len(batch.targets)) or original(m, batch, *a)
    )
    twice = verifier.score(["Hi", "Hi", "Ho"], ["yes", "yes", "yes"])
    assert sum(rows) == 2 * twice[0].num_tokens
    assert twice[0].mean_logprob == twice[1].mean_logprob != twice[2].mean_logprob


def test_signals_follow_their_definitions():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    score = verifier.score(["Hi"], ["Paris é"], stats=("entropy", "max_logprob"))[0]
    total = float(score.tokens.logprob.double().sum())
    assert score.sum_logprob == pytest.approx(total)
    assert score.mean_logprob == pytest.approx(total / score.num_tokens)
    assert score.perplexity == pytest.approx(math.exp(-total / score.num_tokens))
    assert score.num_bytes == 8
    assert score.bits_per_byte == pytest.approx(-total / math.log(2) / 8)
    assert 0 < score.mean_entropy < math.log(320)
    assert score.top1_rate == pytest.approx(
        float((score.tokens.logprob == score.tokens.max_logprob).double().mean())
    )


def test_what_cannot_be_scored_says_why_and_the_rest_is_scored():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    scores = verifier.score(["Hi"] * 3, ["", "Where? " * 200, "Paris"])
    assert scores[0].unscorable == "the response is empty"
    assert "exceed the verifier's context of 256" in scores[1].unscorable
    assert scores[0].mean_logprob is scores[1].perplexity is None
    assert scores[2].mean_logprob is not None


def test_nothing_to_score_is_an_empty_list():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    assert verifier.score([], []) == []
    assert verifier.score(["Hi"], [""])[0].unscorable


def test_prompts_and_responses_must_pair_up():
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        Verifier.of(tiny.llama(), tiny.tokenizer()).score(["a", "b"], ["c"])


def test_broken_weights_are_refused_by_name(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="weights are broken"):
        Verifier.of(model, tiny.tokenizer())
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"NaN or infinite values in model\.layers\.1\.mlp\.up_proj"):
        Verifier.from_pretrained(str(tmp_path))


def test_log_probabilities_that_overflow_are_not_a_score():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    with torch.no_grad():
        verifier.model.get_output_embeddings().weight[5] = math.inf
    assert "not finite" in verifier.score(["Hi"], ["Paris"])[0].unscorable


def test_an_unknown_model_is_named():
    with pytest.raises(ModelError, match="could not load the verifier 'no-such-folder'"):
        Verifier.from_pretrained("no-such-folder")


def test_a_foreign_tokenizer_is_caught_before_the_model_runs():
    model = tiny.llama(vocab_size=100)
    with pytest.raises(ModelError, match="outside the verifier's vocabulary of 100"):
        score_requests(model, [Request((1, 2), (3, 100))], max_batch_tokens=100)


def test_a_head_with_an_adapter_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UnsupportedModelError, match=r"not a plain torch\.nn\.Linear"):
        LMHead.of(model.get_base_model())
    with pytest.raises(ModelError):
        Verifier.of(model.get_base_model(), tiny.tokenizer())


def test_loading_from_a_folder_scores_like_the_model_in_memory(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = Verifier.from_pretrained(str(tmp_path), device="cpu")
    here = Verifier.of(model, tiny.tokenizer())
    assert loaded.score(["Hi"], ["Paris"])[0].mean_logprob == here.score(["Hi"], ["Paris"])[0].mean_logprob
    assert not any(p.requires_grad for p in loaded.model.parameters())
