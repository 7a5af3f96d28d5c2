"""The varlen back ends' kernels against their contract."""

import itertools

import pytest
import torch

from cme.engine import varlen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", [varlen.flash_attn, varlen.torch_varlen, varlen.flex])
def test_the_kernels_do_what_the_contract_says(backend, dtype):
    if backend not in varlen._installed():
        pytest.skip(f"{backend.__name__} is not installed")
    for kind in itertools.product((False, True), repeat=3):
        call = varlen.Call(dtype, 8, 2, 64, 64, *kind)
        if varlen.takes(backend, call):
            assert varlen.works(backend, torch.device("cuda"), call), kind
