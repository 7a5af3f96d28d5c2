"""Compile every shipped kernel configuration ahead of time, without a GPU, and show what became of it.

Each line is one kernel for one target and one dtype: registers a thread, instructions that spill registers to
local memory, kilobytes of shared memory, and tensor-core instructions. The exit status is 1 if something does
not compile, spills, or multiplies bfloat16 or float16 without tensor cores. The kernels' options change the
register count, so each is compiled twice: `plain` (log-probability only) and `full` (every statistic, bias,
softcap, a temperature for each row, all gradients).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cme_kernels import triton_configs as configs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TARGETS = tuple(name for name in configs.HALF if name != "interpreter")
KERNELS = ("span", "merge", "projection_grad")

# Arguments that are None unless something asks for them, and those that are not pointers to float32
_OPTIONAL = {
    *("bias", "temperatures", "inner", "entropy", "grad_entropy", "bias_parts"),
    *("part_shifted", "part_sum_sq", "part_argmax", "out_shifted", "out_sum_sq", "out_argmax"),
}
_INPUT_DTYPE = {"hidden", "weight", "bias", "grad_projection"}
_INT64 = {"targets", "part_argmax", "out_argmax"}
_INTEGERS = {"n_rows", "n_spans", "vocab_size"}
_MULTIPLES_OF_16 = {"hidden_size", "hidden_stride", "weight_stride"}
_FLOATS = {"outer", "inner"}


@dataclass(frozen=True)
class Report:
    kernel: str
    options: str
    target: str
    dtype: str
    tile: str
    registers: int = 0
    spills: int = 0
    tensor_core: int = 0
    shared_bytes: int = 0
    error: str = ""

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.spills:
            return "spills"
        if self.kernel != "merge" and self.dtype != "float32" and not self.tensor_core:
            return "no tensor cores"
        return ""


def reports(targets: Sequence[str], dtypes: Sequence[str], options: Sequence[str]) -> Iterator[Report]:
    """Compile the kernels one by one."""
    for target in targets:
        for dtype in dtypes:
            for kernel in KERNELS:
                for option in options:
                    yield _report(kernel, option, target, dtype)


def _report(kernel: str, options: str, target: str, dtype: str) -> Report:
    tiles = (configs.SINGLE if dtype == "float32" else configs.HALF)[target]
    tile = tiles.backward if kernel == "projection_grad" else tiles.forward
    shape = f"{configs.MERGE_SPANS}x{configs.MERGE_ROWS}" if kernel == "merge" else str(tile)
    try:
        compiled = _compile(kernel, options == "full", target, DTYPES[dtype], tile)
        figures = _amd_figures(compiled) if target.startswith("gfx") else _nvidia_figures(compiled)
    except Exception as error:  # whatever it is, the table shows it and the other kernels go on
        return Report(
            kernel, options, target, dtype, shape, error=f"{type(error).__name__}: {error}".splitlines()[0]
        )
    return Report(kernel, options, target, dtype, shape, *figures)


def _compile(kernel: str, full: bool, target: str, dtype: torch.dtype, tile: configs.Tile) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cme_kernels import triton_backward, triton_forward

    function = {
        "span": triton_forward.span_kernel,
        "merge": triton_forward.merge_kernel,
        "projection_grad": triton_backward.projection_grad_kernel,
    }[kernel]
    options = {"enable_fp_fusion": True} if kernel == "merge" else tile.options
    values: dict[str, Any] = {**tile.constants(4096, dtype), "SPAN_TILES": 4}
    if kernel == "merge":
        values |= {"SPANS": configs.MERGE_SPANS, "ROWS": configs.MERGE_ROWS}

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr or (name in _OPTIONAL and not full):
            signature[name] = "constexpr"
            constants[name] = values.get(name)
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif name in _INTEGERS:
            signature[name] = "i32"
        else:
            element = _TRITON_NAMES[dtype] if name in _INPUT_DTYPE else "i64" if name in _INT64 else "fp32"
            signature[name] = "i32" if name in _MULTIPLES_OF_16 else f"*{element}"
            attributes[(i,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(ASTSource(function, signature, constants, attributes), target=gpu, options=options)


def _nvidia_figures(compiled: Any) -> tuple[int, int, int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(re.findall(r"REG:(\d+)", sass)[0])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    tensor_core = len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass))
    return registers, spills, tensor_core, compiled.metadata.shared


def _amd_figures(compiled: Any) -> tuple[int, int, int, int]:
    assembly = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    tensor_core = len(re.findall(r"\bv_mfma_", assembly))
    return metadata("vgpr_count"), metadata("vgpr_spill_count"), tensor_core, compiled.metadata.shared


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cme_kernels.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET", help=f"{TARGETS}"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of hidden and weight")
    parser.add_argument("--options", nargs="+", choices=("plain", "full"), default=["plain", "full"])
    args = parser.parse_args(arguments)
    # Under the interpreter triton.jit makes functions that cannot be compiled; it decides so when it is imported
    if os.environ.pop("TRITON_INTERPRET", None) and "triton" in sys.modules:
        parser.error("Triton was imported with TRITON_INTERPRET set; unset it")

    row = "{:<15} {:<5} {:<7} {:<8} {:<30} {:>4} {:>6} {:>9} {:>6}  {}"
    heading = ("kernel", "opts", "target", "dtype", "tile", "regs", "spills", "shared KB", "tensor", "")
    print(row.format(*heading))
    failed = False
    for r in reports(args.targets, args.dtypes, args.options):
        shared = f"{r.shared_bytes / 1024:.1f}"
        figures = (r.registers, r.spills, shared, r.tensor_core) if not r.error else ("-",) * 4
        print(row.format(r.kernel, r.options, r.target, r.dtype, r.tile, *figures, r.problem), flush=True)
        failed |= bool(r.problem)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
