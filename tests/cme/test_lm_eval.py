"""Scores against EleutherAI's lm-evaluation-harness, which no one here wrote: `pip install -e '.[lm-eval]'`."""

import copy

import pytest
import tiny
from harness import PROMPTS, RESPONSES, assert_agree
from transformers import Gemma2Config, GptOssConfig, GraniteConfig, LlamaConfig, MambaConfig

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
