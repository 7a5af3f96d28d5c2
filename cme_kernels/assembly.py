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


@dataclass(frozen=True)
class Figures:
    """Registers per thread, instructions that spill, multiply or load by TMA, and shared memory of a kernel."""

    registers: int
    spills: int
    tensor_core: int
    tma: int
    shared_bytes: int


def figures_of(compiled: Any) -> Figures:
    """Read the machine code of a kernel that Triton compiled for an NVIDIA or AMD target."""
    return _amd(compiled) if "amdgcn" in compiled.asm else _nvidia(compiled)


def _nvidia(compiled: Any) -> Figures:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        # Triton brings its own copy of this tool, so no CUDA toolkit is needed
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    return Figures(
        registers=int(re.findall(r"REG:(\d+)", sass)[0]),
        spills=_count(_SPILL, code),
        tensor_core=_count(_MMA, code),
        tma=_count(_TMA, code),
        shared_bytes=compiled.metadata.shared,
    )


def _count(pattern: re.Pattern[str], code: Sequence[str]) -> int:
    return sum(bool(pattern.search(instruction)) for instruction in code)


def _amd(compiled: Any) -> Figures:
    assembly = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    tensor_core = len(re.findall(r"\bv_mfma_", assembly))
    return Figures(metadata("vgpr_count"), metadata("vgpr_spill_count"), tensor_core, 0, compiled.metadata.shared)
