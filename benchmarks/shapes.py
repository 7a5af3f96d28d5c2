"""The LM heads that are measured, and their random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HEADS = {
    "SmolLM2-135M": (576, 49152),
    "Qwen3-0.6B": (1024, 151936),
    "gemma-3-270m": (640, 262144),
    "OLMo-2-7B": (4096, 100352),
    "Llama-3.1-8B": (4096, 128256),
    "Qwen2.5-7B": (3584, 152064),
    "Gemma-3-12B": (3840, 262208),
}
"""Hidden size H and vocabulary size V by model."""

SMALL = ("SmolLM2-135M", "Qwen3-0.6B", "gemma-3-270m")
"""Shapes that a CPU multiplies in seconds; the others have weights of 1.6 to 4 GB in float32."""

GPU_TOKENS = 8192
CPU_TOKENS = {"SmolLM2-135M": 1024, "Qwen3-0.6B": 512, "gemma-3-270m": 512}
CPU_TOKENS_OF_LARGE_HEADS = 256


@dataclass(frozen=True)
class Shape:
    """hidden [tokens, hidden_size] @ weight.T [hidden_size, vocab_size]."""

    name: str
    tokens: int
    hidden_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"{self.name}, {self.tokens} x {self.hidden_size} x {self.vocab_size}"

    @property
    def logits(self) -> int:
        return self.tokens * self.vocab_size

    @property
    def matmul_flop(self) -> int:
        return 2 * self.logits * self.hidden_size

    @property
    def operands(self) -> int:
        """Elements of hidden and weight."""
        return (self.tokens + self.vocab_size) * self.hidden_size


@dataclass(frozen=True)
class Inputs:
    """
    Attributes:
        hidden: [N, H].
        weight: [V, H].
        targets: [N] int64.
        upstream: [N] float32, the gradient of each row's log-probability; never all ones, because a backward
            that mixes up rows would still pass then.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor


def parse_shapes(specs: list[str], tokens: list[int] | None, device: torch.device) -> list[Shape]:
    """Shapes by the names of their models, "small", "all", or "N,H,V".

    Raises:
        ValueError: a name that is none of these, or sizes that are not three positive integers.
    """
    shapes: list[Shape] = []
    for spec in specs:
        if "," in spec:
            shapes.append(_custom(spec))
            continue
        names = {"small": SMALL, "all": tuple(HEADS)}.get(spec, (spec,))
        for name in names:
            if name not in HEADS:
                raise ValueError(f"shape {spec!r} is not one of {', '.join(HEADS)}, small, all, or N,H,V")
            shapes += [Shape(name, n, *HEADS[name]) for n in tokens or [default_tokens(name, device)]]
    return list(dict.fromkeys(shapes))


def _custom(spec: str) -> Shape:
    sizes = spec.split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"shape {spec!r}: expected three positive integers N,H,V (tokens, hidden, vocabulary)")
    return Shape("custom", *map(int, sizes))


def default_tokens(name: str, device: torch.device) -> int:
    return GPU_TOKENS if device.type == "cuda" else CPU_TOKENS.get(name, CPU_TOKENS_OF_LARGE_HEADS)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, spread: float) -> Inputs:
    """Seeded inputs whose logits have the standard deviation `spread`. The values do not change the time of any
    contestant that skips nothing; the errors, and what a contestant that skips small gradients saves, they do."""
    generator = torch.Generator(device).manual_seed(seed)
    n, h, v = shape.tokens, shape.hidden_size, shape.vocab_size
    hidden = torch.randn(n, h, generator=generator, dtype=dtype, device=device)
    weight = torch.randn(v, h, generator=generator, dtype=dtype, device=device).mul_(spread / h**0.5)
    targets = torch.randint(v, (n,), generator=generator, device=device)
    return Inputs(hidden, weight, targets, torch.randn(n, generator=generator, device=device))
