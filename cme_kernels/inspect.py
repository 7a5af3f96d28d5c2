"""Compile every shipped kernel configuration ahead of time, without a GPU, and show its figures.

Each line is one kernel for one target and one dtype: registers per thread, instructions that spill registers to
local memory, kilobytes of shared memory, tensor-core instructions, and loads by the tensor memory accelerator. The
exit status is 1 if something does not compile, spills, multiplies bfloat16 or float16 without tensor cores, or has
no TMA loads where it should. Options change the register count, so each kernel is compiled twice: `plain` (the
log-probability only) and `full` (every statistic, bias, softcap, a temperature for each row, all gradients). Where
the shipped tile uses TMA there are also lines for `pointers`, which inputs take that are not aligned.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cme_kernels import triton_configs as configs
from cme_kernels.assembly import Figures, figures_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TARGETS = tuple(name for name in configs.HALF if name != "interpreter")
KERNELS = ("span", "merge", "projection_grad")

# Arguments that are None unless something asks for them, and those that are not pointers to float32
_OPTIONAL = {
    *("bias", "temperatures", "outer", "inner", "entropy", "grad_entropy", "bias_parts"),
    *("part_shifted", "part_sum_sq", "part_argmax", "out_shifted", "out_sum_sq", "out_argmax"),
}
_INPUT_DTYPE = {"hidden", "weight", "bias", "grad_projection"}
_INT64 = {"targets", "part_argmax", "out_argmax"}
_INTEGERS = {"n_rows", "n_spans"}
_MULTIPLES_OF_16 = {"vocab_size", "hidden_size", "hidden_stride", "weight_stride"}  # as in almost every model
_FLOATS = {"outer", "inner"}
# Tensor descriptors with TMA
_OPERANDS = {"hidden", "weight"}


@dataclass(frozen=True)
class Report:
    """One kernel for one target: its figures, or why it did not compile."""

    kernel: str
    options: str
    loads: str
    target: str
    dtype: str
    tile: str
    figures: Figures | None = None
    error: str = ""

    @property
    def problem(self) -> str:
        if self.figures is None:
            return self.error
        if self.figures.spills:
            return "spills"
        if self.kernel != "merge" and self.dtype != "float32" and not self.figures.tensor_core:
            return "no tensor cores"
        if self.loads == "tma" and not self.figures.tma:
            return "no TMA loads"
        return ""


def reports(targets: Sequence[str], dtypes: Sequence[str], options: Sequence[str]) -> Iterator[Report]:
    """Compile the kernels one by one."""
    for target in targets:
        for dtype in dtypes:
            for kernel in KERNELS:
                for option in options:
                    for loads in _loads(kernel, _tile(kernel, target, dtype)):
                        yield _report(kernel, option, loads, target, dtype)


def _tile(kernel: str, target: str, dtype: str) -> configs.Tile:
    tiles = (configs.SINGLE if dtype == "float32" else configs.HALF)[target]
    return tiles.backward if kernel == "projection_grad" else tiles.forward


def _loads(kernel: str, tile: configs.Tile) -> tuple[str, ...]:
    return ("tma", "pointers") if tile.tma and kernel != "merge" else ("pointers",)


def _report(kernel: str, options: str, loads: str, target: str, dtype: str) -> Report:
    tile = _tile(kernel, target, dtype)
    shape = f"{configs.MERGE_SPANS}x{configs.MERGE_ROWS}" if kernel == "merge" else str(tile)
    report = Report(kernel, options, loads, target, dtype, shape)
    try:
        figures = figures_of(_compile(kernel, options == "full", loads == "tma", target, DTYPES[dtype], tile))
    except Exception as error:  # whatever it is, the table shows it, and the other kernels follow
        return replace(report, error=f"{type(error).__name__}: {error}".splitlines()[0])
    return replace(report, figures=figures)


def _compile(kernel: str, full: bool, tma: bool, target: str, dtype: torch.dtype, tile: configs.Tile) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cme_kernels import triton_backward, triton_forward

    function = {
        "span": triton_forward.span_kernel,
        "merge": triton_forward.merge_kernel,
        "projection_grad": triton_backward.projection_grad_kernel,
    }[kernel]
    # 4096 is a multiple of every tile's depth, as almost every hidden size is
    options = {"enable_fp_fusion": True} if kernel == "merge" else tile.options
    values: dict[str, Any] = {**tile.constants(4096, dtype), "SPAN_TILES": 4, "TMA": tma}
    if kernel == "merge":
        values |= {"SPANS": configs.MERGE_SPANS, "ROWS": configs.MERGE_ROWS}

    # What `triton.jit` would infer from the arguments of a call
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr or (name in _OPTIONAL and not full):
            signature[name] = "constexpr"
            constants[name] = values.get(name)
        elif tma and name in _OPERANDS:
            rows = tile.rows if name == "hidden" else tile.columns
            signature[name] = f"tensordesc<{_TRITON_NAMES[dtype]}[{rows}, {tile.depth}]>"
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif name in _INTEGERS:
            signature[name] = "i32"
        else:
            element = _TRITON_NAMES[dtype] if name in _INPUT_DTYPE else "i64" if name in _INT64 else "fp32"
            signature[name] = "i32" if name in _MULTIPLES_OF_16 else f"*{element}"
            # Addresses that torch allocates, and the sizes of almost every model
            attributes[(i,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(ASTSource(function, signature, constants, attributes), target=gpu, options=options)


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

    row = "{:<15} {:<5} {:<8} {:<7} {:<8} {:<30} {:>4} {:>6} {:>9} {:>6} {:>4}  {}"
    heading = (
        "kernel",
        "opts",
        "loads",
        "target",
        "dtype",
        "tile",
        "regs",
        "spills",
        "shared KB",
        "tensor",
        "TMA",
    )
    print(row.format(*heading, ""))
    failed = False
    for r in reports(args.targets, args.dtypes, args.options):
        print(
            row.format(r.kernel, r.options, r.loads, r.target, r.dtype, r.tile, *_cells(r), r.problem), flush=True
        )
        failed |= bool(r.problem)
    return int(failed)


def _cells(report: Report) -> tuple[object, ...]:
    f = report.figures
    if f is None:
        return ("-",) * 5
    return f.registers, f.spills, f"{f.shared_bytes / 1024:.1f}", f.tensor_core, f.tma


if __name__ == "__main__":
    sys.exit(main())
