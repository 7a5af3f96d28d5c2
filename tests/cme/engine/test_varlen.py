"""The plan and the calls of the varlen back ends, with their contract computed plainly; kernels need a GPU."""

import itertools
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from packaging.version import Version
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import cme.engine.attention
from cme.engine import varlen
from cme.engine.forward import score_batch
from cme.engine.packing import Request, pack
from cme.engine.plan import AttentionOptions, Sequences

CPU = torch.device("cpu")
WINDOWED = {"head_dim": 16, "sliding_window": 6}
FAMILIES = {
    "llama": (LlamaConfig(**tiny.SMALL), LlamaForCausalLM),
    "gemma2": (Gemma2Config(**tiny.SMALL, **WINDOWED), Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig(**tiny.SMALL, **WINDOWED), Gemma3ForCausalLM),
    "gpt-oss": (  # sinks
        GptOssConfig(**tiny.SMALL, **WINDOWED, num_local_experts=2, num_experts_per_tok=1),
        GptOssForCausalLM,
    ),
}
PLAIN = (False, False, False)


def call(kind=PLAIN, dtype=torch.bfloat16, heads=(4, 2, 16, 16)):
    """`kind` is softcap, dropout, sinks; `heads` the query and key heads, the sizes of keys and values."""
    return varlen.Call(dtype, *heads, *kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_over_the_pack_is_the_same_attention(family, monkeypatch):
    model = tiny.build(*FAMILIES[family])
    model.set_attn_implementation("cme_packed")
    system = tuple(range(10, 22))
    prompts = [(*system, 30, 31), (*system, *range(40, 52)), (1, 2)]
    requests = [Request(p, tuple(range(70, 70 + n))) for p in prompts for n in (1, 7)]

    def run():
        model.zero_grad()
        logprob = score_batch(model, pack(requests, CPU)).logprob
        logprob.sum().backward()
        return logprob.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    want, want_gradient = run()
    calls = []

    def choose(q, k, v, options):
        calls.append(options)
        return varlen.plain

    monkeypatch.setattr(varlen, "choose", choose)
    found, gradient = run()
    assert len(calls) == 2
    torch.testing.assert_close(found, want, atol=2e-5, rtol=0)
    assert (gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_same_attention(family, monkeypatch):
    model = tiny.build(*FAMILIES[family])
    model.set_attn_implementation("cme_packed")
    system = tuple(range(10, 140))  # more than one block
    prompts = [(*system, 30, 31), (*system, *range(40, 52)), (1, 2)]
    batch = pack([Request(p, tuple(range(70, 70 + n))) for p in prompts for n in (1, 7)], CPU)
    want = score_batch(model, batch).logprob
    monkeypatch.setattr(cme.engine.attention, "_cascades", lambda *args: False)
    monkeypatch.setattr(varlen, "choose", lambda *args: varlen.flex)
    # Uncompiled, which is slow but the same; on a CPU it has no gradient
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        found = score_batch(model, batch).logprob
    torch.testing.assert_close(found, want, atol=2e-5, rtol=0)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_flex_attention_compiles_for_sequences_of_any_length():
    generator = torch.Generator().manual_seed(0)
    options = AttentionOptions(0.25, 20, 2.0)
    for n in (140, 190):
        keys = [torch.arange(n), torch.arange(2 * n), torch.cat([torch.arange(n), torch.arange(2 * n, 3 * n)])]
        sequences = Sequences.of([n, n, n], keys, CPU)
        q, k, v = (torch.randn(3 * n, heads, 16, generator=generator) for heads in (4, 2, 2))
        inputs = (q, k[sequences.keys], v[sequences.keys], sequences, options)
        with torch.inference_mode():
            torch.testing.assert_close(varlen.flex(*inputs), varlen.plain(*inputs), atol=1e-5, rtol=0)


def test_each_back_end_takes_what_its_kernel_knows():
    def takers(dtype=torch.bfloat16, value_size=64, softcap=False, dropout=False, sinks=False):
        backends = (varlen.flash_attn, varlen.torch_varlen, varlen.flex)
        asked = call((softcap, dropout, sinks), dtype, (8, 2, 64, value_size))
        return [b.__name__ for b in backends if varlen.takes(b, asked)]

    assert takers() == ["flash_attn", "torch_varlen", "flex"]
    assert takers(softcap=True) == ["flash_attn", "flex"]
    assert takers(dropout=True) == ["flash_attn"]
    assert takers(sinks=True) == takers(torch.float32) == takers(value_size=32) == ["flex"]
    assert takers(torch.float64) == takers(torch.float32, dropout=True) == []


def forgets(**forgotten):
    def backend(q, k, v, sequences, options):
        return varlen.plain(q, k, v, sequences, options._replace(**forgotten))

    return backend


def top_left(q, k, v, sequences, options):
    shorter = replace(sequences, cu_keys=sequences.cu_queries)
    return varlen.plain(q, k[: len(q)], v[: len(q)], shorter, options)


def without_gradient_of_values(q, k, v, sequences, options):
    return varlen.plain(q, k, v.detach() + 0 * v, sequences, options)


def sinks_of_zero(q, k, v, sequences, options):
    return varlen.plain(q, k, v, sequences, options._replace(sinks=0 * options.sinks))


def unscaled_dropout(q, k, v, sequences, options):
    return varlen.plain(q, k, v, sequences, options) * (1 - options.dropout)


def broken(*args):
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("backend", "kind", "reason"),
    [
        (forgets(window=None), PLAIN, "differs"),
        (top_left, PLAIN, "differs"),
        (without_gradient_of_values, PLAIN, "differs"),
        (broken, PLAIN, "no kernel image"),
        (forgets(softcap=None), (True, False, False), "differs"),
        (forgets(dropout=0.0), (False, True, False), "dropout leaves"),
        (unscaled_dropout, (False, True, False), "dropout leaves"),
        (sinks_of_zero, (False, False, True), "differs"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_left_out_with_a_warning(backend, kind, reason):
    with pytest.warns(UserWarning, match=reason):
        assert not varlen.works(backend, CPU, call(kind))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_right_kernel_is_used_whoever_asks_first(mode):
    varlen.works.cache_clear()
    with mode():
        for kind in itertools.product((False, True), repeat=3):
            assert varlen.works(varlen.plain, CPU, call(kind, heads=(4, 2, 16, 32)))


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.10 has other arguments")
def test_torch_has_the_arguments_that_are_passed():
    # On a CPU its checks of the arguments pass, and then there is no kernel
    sequences = Sequences.of([2, 1], [torch.arange(2), torch.arange(3)], CPU)
    q, k = torch.randn(3, 4, 16).bfloat16(), torch.randn(5, 2, 16).bfloat16()
    assert varlen.torch_varlen in varlen._installed()
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        varlen.torch_varlen(q, k, k, sequences, AttentionOptions(0.25, 3, None, 0.0))
