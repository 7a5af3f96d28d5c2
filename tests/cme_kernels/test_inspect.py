from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cme_kernels.custom_op import triton_available

pytestmark = pytest.mark.skipif(not triton_available(), reason="no Triton")


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Another process: in this one Triton may be an interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cme_kernels.inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_shipped_kernels_compile_without_spills() -> None:
    targets = ("sm_80", "sm_90", "sm_100")
    run = inspect("--targets", *targets, "--dtypes", "bfloat16", "--options", "full")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if "bfloat16" in line]
    assert len(lines) == 3 + 5 + 5  # Hopper and later: span and projection_grad with and without TMA
    for name, _, loads, target, *_, registers, spills, _, tensor_core, tma in lines:
        assert 0 < int(registers) <= 255
        assert int(spills) == 0
        assert (int(tensor_core) > 0) == (name != "merge")
        assert (int(tma) > 0) == (loads == "tma")
        assert target != "sm_80" or loads == "pointers"


def test_a_tile_that_spills_fails() -> None:
    program = (
        "from cme_kernels import inspect, triton_configs as c; tile = c.Tile(128, 256, 64, warps=4, stages=2);"
        "c.HALF['sm_90'] = c.Tiles(tile, tile); inspect.KERNELS = ('span',);"
        "print(inspect.main(['--targets', 'sm_90', '--dtypes', 'float16', '--options', 'plain']))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout.splitlines()[-1] == "1"
    assert "spills" in run.stdout.splitlines()[1]


def test_a_target_that_does_not_exist_is_refused() -> None:
    run = inspect("--targets", "sm_10")
    assert run.returncode == 2
    assert "invalid choice: 'sm_10'" in run.stderr
