"""`linear_logprob` at the sizes of models, with the tiles that ship."""

from __future__ import annotations

import pytest
import torch
from linear_problem import OPTIONS, check_forward, check_gradients, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_model_sizes_on_a_gpu(dtype: torch.dtype, options: str) -> None:
    device = torch.device("cuda")
    problem = make(dtype, device, options, n=300, h=1024, v=50_001)
    check_forward(problem, "triton")
    check_gradients(problem, "triton", [torch.randn(300, device=device), torch.randn(300, device=device)])
