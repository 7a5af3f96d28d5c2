from __future__ import annotations

import pytest
import torch

from cme_kernels.custom_op import triton_available

CUDA = torch.cuda.is_available()
IMPLEMENTATIONS = [
    "reference",
    "tiled",
    pytest.param("triton", marks=[pytest.mark.skipif(not triton_available(), reason="no Triton")]),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS[1:])
def fused(request: pytest.FixtureRequest) -> str:
    """An implementation that never holds the logits."""
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    fixtures = {"implementation", "fused"} & set(request.fixturenames)
    triton = any(request.getfixturevalue(name) == "triton" for name in fixtures)
    if request.param == "bfloat16" and triton and not CUDA:
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
