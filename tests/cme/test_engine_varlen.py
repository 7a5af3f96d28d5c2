"""The plan and the calls of the varlen back ends, with their contract computed plainly; the kernels need a GPU."""

import pytest
import tiny
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from cme import varlen
from cme.lm_head import score_batch
from cme.packing import Request, pack

CPU = torch.device("cpu")
WINDOWED = {"head_dim": 16, "sliding_window": 6}
FAMILIES = {
    "llama": (LlamaConfig(**tiny.SMALL), LlamaForCausalLM),
    "gemma2": (Gemma2Config(**tiny.SMALL, **WINDOWED), Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig(**tiny.SMALL, **WINDOWED), Gemma3ForCausalLM),
}


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


def test_a_kernel_that_is_wrong_or_fails_is_left_out_with_a_warning():
    def no_window(q, k, v, sequences, options):
        return varlen.plain(q, k, v, sequences, options._replace(window=None))

    def top_left(q, k, v, sequences, options):
        shorter = sequences._replace(keys=None, cu_keys=sequences.cu_queries)
        return varlen.plain(q, k[: len(q)], v[: len(q)], shorter, options)

    def broken(*args):
        raise RuntimeError("no kernel image")

    heads = (4, 2, 16)
    for mode in (torch.inference_mode, torch.no_grad):
        varlen.works.cache_clear()
        with mode():
            assert varlen.works(varlen.plain, CPU, torch.bfloat16, heads)
    varlen.works.cache_clear()
    assert varlen.works(varlen.plain, CPU, torch.bfloat16, heads)
    for backend, reason in ((no_window, "differs"), (top_left, "differs"), (broken, "no kernel image")):
        with pytest.warns(UserWarning, match=reason):
            assert not varlen.works(backend, CPU, torch.bfloat16, heads)


def test_torch_has_the_arguments_that_are_passed():
    # On a CPU its checks of the arguments pass, and then there is no kernel
    sequences = varlen.Sequences.of([2, 1], [torch.arange(2), torch.arange(3)], CPU)
    q, k = torch.randn(3, 4, 16).bfloat16(), torch.randn(5, 2, 16).bfloat16()
    assert varlen.torch_varlen in varlen._installed()
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        varlen.torch_varlen(q, k, k, sequences, varlen.Options(0.25, 3, None, 0.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [varlen.flash_attn, varlen.torch_varlen])
def test_the_kernels_do_what_the_contract_says(backend, dtype):
    if backend not in varlen._installed():
        pytest.skip(f"{backend.__name__} is not installed")
    assert varlen.works(backend, torch.device("cuda"), dtype, (8, 2, 64))
