"""The public op: argument checks, choice of implementation, autograd."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from cme_kernels import reference, tiled
from cme_kernels.stats import IGNORE_INDEX, OPTIONAL_STATS, LogitTransform, TokenStats, outside

Implementation = Literal["reference", "tiled", "triton"]


class Kernels(NamedTuple):
    """What an implementation provides; `tiled` documents the signatures."""

    forward: Callable[..., TokenStats]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    stats: Sequence[str] = (),
    implementation: Implementation | None = None,
) -> TokenStats:
    """Log-probability of each row's target under softmax(z), without ever holding the [N, V] logits z, where

        z = f(logit_scale * (hidden @ weight.T + bias)) / temperature,   f(x) = softcap * tanh(x / softcap) or x.

    Every statistic comes from float32 accumulators, whatever the dtype of the inputs. Differentiable in
    hidden, weight and bias through `logprob` and `entropy`, with any gradient per row; rows whose gradient
    is zero cost nothing in the backward, and a frozen weight costs no weight gradient.

    Args:
        hidden: [N, H], bfloat16, float16 or float32 (float64 too, except in Triton). N may be 0.
        weight: [V, H], the dtype of `hidden`. A DTensor is gathered in the forward; in the backward its
            gradient is averaged over the mesh, as FSDP does, and scattered. Under autocast `hidden` and
            `weight` are cast to the autocast dtype.
        targets: [N] int64, in [0, V), or -100 for rows to skip: they get 0 (`argmax` -1) and no gradient.
        bias: [V], of any floating-point dtype.
        softcap: bound of the logits, for models that squash them (Gemma 2).
        logit_scale: factor on the projection (Cohere, Granite).
        temperature: positive; one number or a tensor [N]. Not differentiable. On CUDA a row whose entry in
            a tensor is not positive becomes NaN.
        stats: which of "entropy", "lse", "max_logprob", "argmax", "log_sum_sq_probs" to compute as well.
        implementation: "triton" (default on CUDA and ROCm), "tiled" (torch; default elsewhere), or
            "reference" (float64 from full logits, for tests).

    Returns:
        TokenStats, each field of shape [N]; what was not asked for is None.

    Raises:
        IndexError: a target outside the vocabulary, on CPU. On CUDA that row is NaN instead, because a
            check would wait for the device.
        ValueError: shapes, dtypes or options that do not fit; the message names the value.
    """
    weight = _gather(weight)
    bias = None if bias is None else _gather(bias)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
    _check(hidden, weight, targets, bias, softcap, logit_scale, temperature, stats)
    if isinstance(temperature, Tensor):
        temperature = _row_temperatures(temperature, hidden)
    transform = LogitTransform(softcap, float(logit_scale), temperature)
    implementation = implementation or _default_implementation(hidden)
    if hidden.device.type == "cpu":
        tiled.check_targets(targets, len(weight))
    if implementation == "reference":
        return reference.token_stats(hidden, weight, targets, bias, transform, stats)
    kernels = _kernels(implementation, hidden)
    values = _LinearLogprob.apply(hidden, weight, bias, targets, transform, tuple(stats), kernels)
    return TokenStats(**dict(zip(TokenStats.names(), values, strict=True)))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        stats: tuple[str, ...],
        kernels: Kernels,
    ) -> tuple[Tensor | None, ...]:
        differentiable = any(ctx.needs_input_grad[:3])
        computed = (*stats, "lse") if differentiable and "lse" not in stats else stats
        out: TokenStats = kernels.forward(hidden, weight, targets, bias, transform, computed)
        if differentiable:
            ctx.save_for_backward(hidden, weight, bias, targets, out.lse, out.entropy)
            ctx.transform, ctx.kernels = transform, kernels
        ctx.set_materialize_grads(False)
        values = tuple(getattr(out, n) if n == "logprob" or n in stats else None for n in TokenStats.names())
        ctx.mark_non_differentiable(*(v for v in values[2:] if v is not None))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None and grads[1] is None:
            return (None,) * 7
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        # A log-probability that is NaN has no gradient to be multiplied with
        grad_logprob = None if grads[0] is None else grads[0].masked_fill(outside(targets, len(weight)), torch.nan)
        upstream = (grad_logprob, grads[1])
        # Clipped tokens and groups without advantage have no gradient, so they need no logits either
        live = targets != IGNORE_INDEX
        live &= torch.stack([g != 0 for g in upstream if g is not None]).any(0)
        rows = live.nonzero().squeeze(1)
        grad_hidden, grad_weight, grad_bias = ctx.kernels.backward(
            *(None if g is None else g[rows] for g in upstream),
            hidden[rows],
            weight,
            targets[rows],
            bias,
            ctx.transform.rows(rows),
            lse[rows],
            None if entropy is None else entropy[rows],
            needs,
        )
        if grad_hidden is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def _default_implementation(hidden: Tensor) -> Implementation:
    return "triton" if hidden.is_cuda and hidden.dtype != torch.float64 and triton_available() else "tiled"


def _kernels(implementation: str, hidden: Tensor) -> Kernels:
    if implementation == "tiled":
        return Kernels(tiled.forward, tiled.backward)
    if implementation != "triton":
        raise ValueError(f"implementation={implementation!r} is not one of 'triton', 'tiled', 'reference'")
    if not triton_available():
        raise ImportError("implementation='triton' needs the triton package: pip install triton")
    if hidden.dtype == torch.float64:
        raise ValueError("implementation='triton' has no float64; use 'tiled'")
    if hidden.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("implementation='triton' needs a GPU, or TRITON_INTERPRET=1 to debug it on a CPU")
        if hidden.dtype == torch.bfloat16:
            raise ValueError("Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32")
    from cme_kernels import triton_backward, triton_forward

    return Kernels(triton_forward.forward, triton_backward.backward)


def _gather(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # Each rank has the gradient of its own rows. The default would take them for equal and keep a slice of one
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch does: float64 stays
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _row_temperatures(temperature: Tensor, hidden: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    temperature = temperature.to(hidden.device, dtype).expand(len(hidden))
    positive = temperature > 0
    if hidden.device.type == "cpu" and not positive.all():
        row = int((~positive).nonzero()[0])
        raise ValueError(f"temperature must be positive, got temperature[{row}] = {float(temperature[row])}")
    return temperature.where(positive, torch.nan)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float | Tensor,
    stats: Sequence[str],
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    n, vocab_size = len(hidden), len(weight)
    if vocab_size == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if targets.shape != (n,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 of shape [{n}], got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and (bias.shape != (vocab_size,) or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be floating-point of shape [{vocab_size}], got {bias.dtype} {tuple(bias.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; convert one of them")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating-point tensor, got {hidden.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} but {name} on {tensor.device}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature requires a gradient, but none is computed for it; detach it")
        if temperature.dim() and temperature.shape != (n,):
            raise ValueError(f"temperature must be a number or have shape [{n}], got {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    unknown = set(stats) - set(OPTIONAL_STATS)
    if unknown:
        raise ValueError(f"unknown stats {sorted(unknown)}; choose from {', '.join(OPTIONAL_STATS)}")
