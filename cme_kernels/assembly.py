"""Figures of compiled kernels, read off their machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Tensor cores on Ampere, Hopper, Blackwell; TMA loads; stores to and loads from local memory, which are spills
_MMA = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
_TMA = re.compile(r"\bUTMALDG\b")
_SPILL = re.compile(r"\b(?:STL|LDL)\b")

PEAK_FLOPS_PER_CYCLE = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
"""Dense half-precision FLOP per cycle and SM: A100 312 TFLOPS, H100 SXM 989, B200 2250 by their data sheets."""
SCHEDULERS = 4
"""Schedulers per SM, each of which issues one warp's instruction per cycle."""
MUFU_CYCLES = 8
"""Cycles of a scheduler for exp2 and the like: 16 lanes per SM are 4 per scheduler, for a warp's 32 threads."""


@dataclass(frozen=True)
class Figures:
    """Figures of one kernel; `epilogue` is (instructions, of which special functions) per warp outside its inner
    loop."""

    registers: int
    spills: int
    tensor_core: int
    tma: int
    shared_bytes: int
    epilogue: tuple[int, int] | None = None


def figures_of(compiled: Any) -> Figures:
    """Read the machine code of a kernel that Triton compiled for an NVIDIA or AMD target."""
    return _amd(compiled) if "amdgcn" in compiled.asm else _nvidia(compiled)


def epilogue_share(
    figures: Figures, target: str, tile: tuple[int, int], warps: int, hidden_size: int
) -> float | None:
    """Estimated share of a tile's time that its epilogue takes, if it overlaps with no product.

    The products take 2 rows columns hidden_size / peak cycles. Each of a scheduler's `warps / SCHEDULERS` warps
    issues one epilogue instruction per cycle, a special function in MUFU_CYCLES; branches count as taken.
    """
    if figures.epilogue is None or target not in PEAK_FLOPS_PER_CYCLE:
        return None
    instructions, special = figures.epilogue
    products = 2 * tile[0] * tile[1] * hidden_size / PEAK_FLOPS_PER_CYCLE[target]
    rest = warps / SCHEDULERS * (instructions + special * (MUFU_CYCLES - 1))
    return rest / (rest + products)


def _nvidia(compiled: Any) -> Figures:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        # Triton brings its own copy of this tool, so no CUDA toolkit is needed
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    return Figures(
        registers=int(re.findall(r"REG:(\d+)", sass)[0]),
        spills=_count(_SPILL, code),
        tensor_core=_count(_MMA, code),
        tma=_count(_TMA, code),
        shared_bytes=compiled.metadata.shared,
        epilogue=_epilogue(code),
    )


def _epilogue(code: Sequence[tuple[int, str]]) -> tuple[int, int] | None:
    """Instructions per tile outside the loop over the hidden size, in the loop around it or the whole kernel."""
    # The shortest loop with a tensor-core product in it is the one over the hidden size
    loops = sorted(_loops(code), key=lambda loop: loop[1] - loop[0])
    inner = next((loop for loop in loops if any(_MMA.search(text) for text in _within(code, loop))), None)
    if inner is None:
        return None
    outer = next((loop for loop in loops if loop[0] < inner[0] and inner[1] < loop[1]), (0, code[-1][0]))
    rest = [text for a, text in code if outer[0] <= a <= outer[1] and not inner[0] <= a <= inner[1]]
    return len(rest), sum("MUFU" in text for text in rest)


def _loops(code: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last) addresses of each jump back; without the jump to itself that ends every kernel."""
    branches = [(a, re.search(r"\bBRA\S*\s.*?\b0x([0-9a-f]+)", text)) for a, text in code]
    return [(int(to[1], 16), a) for a, to in branches if to is not None and int(to[1], 16) < a]


def _within(code: Sequence[tuple[int, str]], loop: tuple[int, int]) -> list[str]:
    return [text for a, text in code if loop[0] <= a <= loop[1]]


def _count(pattern: re.Pattern[str], code: Sequence[tuple[int, str]]) -> int:
    return sum(bool(pattern.search(text)) for _, text in code)


def _amd(compiled: Any) -> Figures:
    assembly = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    tensor_core = len(re.findall(r"\bv_mfma_", assembly))
    return Figures(metadata("vgpr_count"), metadata("vgpr_spill_count"), tensor_core, 0, compiled.metadata.shared)
