"""Tile shapes of the Triton kernels, one table for all of them.

A row's result depends on the tile shape and on nothing else that varies from call to call, so the shape
follows from the architecture, the dtype and the vocabulary only: no autotuning, and nothing looks at N.
`python -m cme_kernels.inspect` compiles every entry and shows its registers, spills and shared memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Tile:
    """A program multiplies [rows, depth] by [depth, columns] until it has a [rows, columns] tile of logits.

    `group` row tiles walk through the vocabulary together, so that they share weight tiles in the L2 cache.
    With `tma` the tensor memory accelerator fetches the operands (Hopper and later), where their addresses and
    strides are multiples of 16 bytes; elsewhere each thread computes addresses. The products are the same.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = False

    def constants(self, hidden_size: int, dtype: torch.dtype) -> dict[str, Any]:
        """Compile-time arguments of the kernels that multiply."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "GROUP": self.group,
            "EVEN_DEPTH": hidden_size % self.depth == 0,
            # TF32 would round float32 inputs to 10 bits
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            **self.options,
        }

    @property
    def options(self) -> dict[str, Any]:
        # FMA contraction is Triton's default up to 3.9 only: bits and speed must not follow its version
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def __str__(self) -> str:
        return "{rows}x{columns}x{depth}, {warps} warps, {stages} stages".format(**asdict(self))


class Tiles(NamedTuple):
    """The forward reads its tile in quarters; the backward writes it whole: no registers left at 128 x 256."""

    forward: Tile
    backward: Tile


HALF: dict[str, Tiles] = {
    # 60 and 64 KB of shared memory: sm_86, sm_89 and sm_120 let a block have 99
    "sm_80": Tiles(Tile(64, 256, 32, warps=8, stages=4), Tile(128, 128, 64, warps=8, stages=3)),
    # 144 and 128 KB of the 227 that a block may have; up to 255 registers, the most that a thread may have
    "sm_90": Tiles(
        Tile(128, 256, 64, warps=8, stages=3, tma=True), Tile(128, 128, 64, warps=8, stages=4, tma=True)
    ),
    "sm_100": Tiles(
        Tile(128, 256, 64, warps=8, stages=3, tma=True), Tile(128, 128, 64, warps=8, stages=4, tma=True)
    ),
    # 64 KB, all the local memory of a compute unit
    "gfx942": Tiles(Tile(128, 128, 64, warps=8, stages=2), Tile(128, 128, 64, warps=8, stages=2)),
    # Small, so that tests with small tensors have several tiles, spans, and a last tile that is not full
    "interpreter": Tiles(
        Tile(32, 128, 32, warps=4, stages=1, group=2, tma=True), Tile(32, 64, 32, warps=4, stages=1, tma=True)
    ),
}
"""bfloat16 and float16. Consumer cards (sm_86, sm_89, sm_120) run the sm_80 entry."""

_SINGLE = Tiles(Tile(64, 128, 32, warps=8, stages=3), Tile(64, 128, 32, warps=8, stages=3))
SINGLE: dict[str, Tiles] = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "gfx942"), _SINGLE),
    "interpreter": HALF["interpreter"],
}
"""float32: exact products have no tensor cores, so a smaller tile of plain FMAs."""

MERGE_SPANS, MERGE_ROWS = 32, 32
"""Tile of the kernel that merges the partial statistics of the spans: eight elements per thread of four warps. It
reads at most 256 spans per row, which is little beside V x H, so the shape is not tuned."""

BACKWARD_WORKSPACE = 256 * 2**20
"""Bytes of d loss / d projection that exist at a time. Wide enough for the gradient matmuls to be efficient."""


def tiles(device: torch.device, dtype: torch.dtype) -> Tiles:
    return (SINGLE if dtype == torch.float32 else HALF)[architecture(device)]


def architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def span_tiles(vocab_size: int, columns: int) -> int:
    """Tiles in a program's slice of the vocabulary: 128 to 256 slices, so that even one row tile fills a GPU (an
    H100 has 132 multiprocessors), or one tile per slice where there are fewer tiles."""
    return max(1, vocab_size // (128 * columns))


def backward_columns(n: int, itemsize: int, columns: int) -> int:
    """Width of a vocabulary chunk in the backward: the tiles that the workspace holds for n rows, at least one."""
    return max(1, BACKWARD_WORKSPACE // (max(n, 1) * itemsize * columns)) * columns
