"""What must be set before libraries are imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a wrong name must not wait for the network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels run in Triton's interpreter

pytest.register_assert_rewrite("harness", "linear_problem")  # of tests/support
