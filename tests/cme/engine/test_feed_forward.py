"""Feed-forward layers in chunks: the same values, and nothing left behind."""

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf

from cme.engine.feed_forward import CHUNK, in_chunks, in_chunks_throughout
from cme.engine.forward import score_requests
from cme.engine.packing import Request
from cme.errors import ModelError
from cme.verifier import Verifier

MIXTRAL = tf.MixtralConfig(**tiny.SMALL, num_local_experts=4, num_experts_per_tok=2)


def count_calls(model):
    """Tokens of each call of the first layer's activation function."""
    tokens = []
    activation = model.model.layers[0].mlp.act_fn
    activation.register_forward_hook(lambda module, args, out: tokens.append(out[..., 0].numel()))
    return tokens


@pytest.mark.parametrize("shape", [(1, 20, 64), (3, 7, 64), (20, 64)])
def test_chunks_have_the_values_of_the_whole(shape):
    model = tiny.llama()
    mlp, tokens = model.model.layers[0].mlp, count_calls(model)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).transpose(0, -2)  # not contiguous
    with torch.inference_mode():
        whole = mlp(hidden)
        tokens.clear()
        with in_chunks(model, 8):
            found = mlp(hidden)
    assert tokens == ([7, 7, 6] if hidden[..., 0].numel() == 20 else [7, 7, 7])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-4)  # of values up to 20


def test_a_long_pack_is_cut_and_scored_as_one_by_one():
    model = tiny.llama(max_position_embeddings=4096)
    model.set_attn_implementation("cme_packed")
    tokens = count_calls(model)
    requests = [Request((5, 6, i), tuple(range(7, 107)) * 3) for i in range(10, 14)]
    packed = score_requests(model, requests)
    assert sum(tokens) > 2 * CHUNK >= 2 * max(tokens)
    alone = [score_requests(model, [request])[0] for request in requests]
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one.logprob, other.logprob, rtol=1e-5, atol=1e-4)


def test_afterwards_the_layers_are_as_they_were():
    model = tiny.llama()
    before = [dict(module.__dict__) for module in model.modules()]

    def fail_within():
        with in_chunks(model), in_chunks(model):  # the inner finds nothing to do
            assert any("forward" in module.__dict__ for module in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_within()
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_experts_compiled_layers_and_those_with_more_inputs_are_left_alone():
    mixtral, compiled = tiny.build(MIXTRAL, tf.MixtralForCausalLM), tiny.llama()
    bloom = tiny.build(tf.BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4), tf.BloomForCausalLM)
    assert in_chunks_throughout(compiled)
    for layer in compiled.model.layers:
        layer.compile()
    for model in (mixtral, compiled, bloom):
        assert not in_chunks_throughout(model)
        with in_chunks(model):
            assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_layer_that_mixes_tokens_is_found_out():
    class Mixing(tf.models.llama.modeling_llama.LlamaMLP):
        def forward(self, x):
            return super().forward(x + F.pad(x, (0, 0, 1, 0))[..., :-1, :])  # each with the one before it

    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.__class__ = Mixing
    with pytest.raises(ModelError, match="can't be scored exactly: a token's log-probability differs"):
        Verifier.of(model, tiny.tokenizer())
