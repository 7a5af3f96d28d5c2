"""Scores against EleutherAI's lm-evaluation-harness, which no one here wrote: `pip install -e '.[lm-eval]'`."""

import copy

import pytest
import tiny
from transformers import Gemma2Config, GptOssConfig, GraniteConfig, LlamaConfig, MambaConfig

from cme.text.rendering import PLAIN_TEMPLATE
from cme.verifier import Verifier

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[lm-eval]'")

H = {**tiny.SMALL, "head_dim": 16}
MODELS = {
    "llama": LlamaConfig(**tiny.SMALL),
    "gemma2": Gemma2Config(**H, sliding_window=12, final_logit_softcapping=5.0),
    "granite": GraniteConfig(**tiny.SMALL, logits_scaling=4.0),
    "gpt-oss": GptOssConfig(**H, sliding_window=12, num_local_experts=4, num_experts_per_tok=2),
    "mamba": MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, state_size=8, initializer_range=0.3),
}
PROMPTS = ["What is the capital of France?"] * 3 + ["Where?"] * 2
RESPONSES = ["Paris.", "The capital of France is Paris.", "naïve 🙂", "Here!", "In the north, I think."]


def harness_scores(model, tokenizer, prompts, responses):
    """log p(response | prompt) in nats, and whether greedy decoding would have given the response."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    before, after = PLAIN_TEMPLATE.split("{prompt}")
    after = after.removesuffix(" {response}")
    pairs = [(before + p + after, f" {r}") for p, r in zip(prompts, responses, strict=True)]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return harness.loglikelihood(instances, disable_tqdm=True)


def assert_agree(verifier, harness_model, prompts, responses):
    theirs = harness_scores(harness_model, verifier.renderer.tokenizer, prompts, responses)
    ours = verifier.score(prompts, responses, stats=("max_logprob",))
    for score, (total, greedy) in zip(ours, theirs, strict=True):
        assert score.sum_logprob == pytest.approx(total, abs=2e-5 * score.num_tokens)
        assert (score.top1_rate == 1) == greedy


@pytest.mark.filterwarnings("ignore:.*right-padded")
@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_agree_with_the_harness(name):
    from transformers import AutoModelForCausalLM

    def build():
        model_class = AutoModelForCausalLM._model_mapping[type(MODELS[name])]
        return tiny.build(copy.deepcopy(MODELS[name]), model_class)

    theirs = build()
    theirs.set_attn_implementation("eager")
    assert_agree(Verifier.of(build(), tiny.tokenizer(chat=False)), theirs, PROMPTS, RESPONSES)


@pytest.mark.real_models
def test_smollm2_agrees_with_the_harness():
    from transformers import AutoModelForCausalLM

    from cme.demo.models import local_path

    path = str(local_path("smollm2-135m-instruct"))
    verifier = Verifier.from_pretrained(path, device="cpu", template=PLAIN_TEMPLATE)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation="eager")
    assert_agree(verifier, theirs, PROMPTS, RESPONSES)
