from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cme_kernels import assembly
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
    for name, _, loads, target, *_, registers, spills, _, tensor_core, tma, epilogue in lines:
        assert 0 < int(registers) <= 255
        assert int(spills) == 0
        assert (int(tensor_core) > 0) == (name != "merge")
        assert (int(tma) > 0) == (loads == "tma")
        assert target != "sm_80" or loads == "pointers"
        if name == "merge":
            assert epilogue == "-/-"
        else:
            wide, narrow = (int(share) for share in epilogue.split("/"))
            assert 0 < wide < narrow < 100


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


def test_the_epilogue_is_what_surrounds_the_inner_loop() -> None:
    code = [
        (0x00, "MOV R1, c[0x0][0x28]"),
        (0x10, "IADD3 R2, R2, 0x1, RZ"),  # the outer loop
        (0x20, "LDGSTS.E.128 [R4], [R2.64]"),  # the inner loop
        (0x30, "HMMA.16816.F32.BF16 R4, R8, R10, R4"),
        (0x40, "@P0 BRA 0x20"),
        (0x50, "MUFU.EX2 R5, R5"),
        (0x60, "FADD R6, R6, R5"),
        (0x70, "@!P1 BRA 0x10"),
        (0x80, "EXIT"),
        (0x90, "BRA 0x90"),
    ]
    assert assembly._epilogue(code) == (4, 1)
    without_outer = [line for line in code if line[0] != 0x70]
    assert assembly._epilogue(without_outer) == (6, 1)
    assert assembly._epilogue([(a, text) for a, text in code if "HMMA" not in text]) is None


def test_epilogue_share_by_hand() -> None:
    # 4 warps, one a scheduler: 100 + 7 x 10 cycles. Products: 2 x 64 x 64 x 128 / 4096 = 256 cycles
    figures = assembly.Figures(64, 0, 1, 1, 0, epilogue=(100, 10))
    assert assembly.epilogue_share(figures, "sm_90", (64, 64), 4, 128) == pytest.approx(170 / (170 + 256))
    assert assembly.epilogue_share(figures, "gfx942", (64, 64), 4, 128) is None
