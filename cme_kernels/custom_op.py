"""`linear_logprob` as operators of torch: one opaque node for torch.compile, with a gradient of its own.

An operator has a fixed number of outputs, none of them None: what was not asked for has no elements. The public
wrapper turns that into a `TokenStats`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cme_kernels import checks, tensor_parallel, tiled
from cme_kernels.stats import IGNORE_INDEX, LogitTransform, PartialStats, TokenStats, outside


class Kernels(NamedTuple):
    """What an implementation provides; `tiled` documents the signatures."""

    partial_stats: Callable[..., PartialStats]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperatures, float temperature, "
    "float? softcap, float logit_scale, str implementation, str group"
)


@torch.library.custom_op(
    "cme::linear_logprob",
    mutates_args=(),
    schema=f"({_INPUTS}, str[] stats) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    implementation: str,
    group: str,
    stats: Sequence[str],
) -> tuple[Tensor, ...]:
    """The fields of `TokenStats`, in order, then d logprob / d hidden [N, H].

    The last if `stats` has "hidden_grad", which only "tiled" knows. `group` names a process group, or is empty.
    """
    shard = tensor_parallel.shard_of(weight, group)
    if hidden.device.type == "cpu":  # on a GPU a check would wait for the device
        checks.check_values(targets, shard.vocab_size, row_temperatures)
    elif row_temperatures is not None:
        good = (row_temperatures > 0) & (row_temperatures < torch.inf)
        row_temperatures = row_temperatures.where(good, torch.nan)
    transform = _transform(row_temperatures, temperature, softcap, logit_scale)
    kernels = kernels_for(implementation, hidden)
    with _plain(hidden):
        partial = kernels.partial_stats(hidden, weight, targets - shard.start, bias, transform, stats)
    partial = tensor_parallel.merge_shards(partial, shard)
    out = partial.finalize(targets, stats, shard.vocab_size)
    nothing = partial.max.new_empty
    values = [nothing(0) if (x := getattr(out, name)) is None else x for name in TokenStats.names()]
    if "hidden_grad" in stats:
        return *values, tiled.hidden_grad(partial, weight, targets, transform)
    return *values, nothing(0)


@linear_logprob_op.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, ...]:
    stats = options[-1]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    values = [
        torch.empty(
            hidden.shape[0] if name == "logprob" or name in stats else 0,  # len would fix a symbolic size
            dtype=torch.int64 if name == "argmax" and name in stats else dtype,
            device=hidden.device,
        )
        for name in TokenStats.names()
    ]
    shape = hidden.shape if "hidden_grad" in stats else (0,)
    return *values, torch.empty(shape, dtype=dtype, device=hidden.device)


@torch.library.custom_op(
    "cme::linear_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_logprob, Tensor? grad_entropy, Tensor lse, Tensor entropy, bool[] needs, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor)",
)
def linear_logprob_backward_op(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    implementation: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias where `needs` asks for them, else tensors without elements."""
    shard = tensor_parallel.shard_of(weight, group)
    if grad_logprob is not None:
        # A log-probability that is NaN has no gradient to be multiplied with
        lost = outside(targets, shard.vocab_size) & (grad_logprob != 0)
        grad_logprob = grad_logprob.masked_fill(lost, torch.nan)
    upstream = (grad_logprob, grad_entropy)
    # Clipped tokens and groups without advantage have no gradient, so they need no logits either
    live = targets != IGNORE_INDEX
    live &= torch.stack([g != 0 for g in upstream if g is not None]).any(0)
    rows = live.nonzero().squeeze(1)
    transform = _transform(row_temperatures, temperature, softcap, logit_scale)
    with _plain(hidden):
        grad_hidden, grad_weight, grad_bias = kernels_for(implementation, hidden).backward(
            *(None if g is None else g[rows] for g in upstream),
            hidden[rows],
            weight,
            targets[rows] - shard.start,
            bias,
            transform.rows(rows),
            lse[rows],
            None if grad_entropy is None else entropy[rows],
            tuple(needs),
        )
    if grad_hidden is not None:
        grad_hidden = torch.zeros_like(hidden, dtype=grad_hidden.dtype).index_copy_(0, rows, grad_hidden)
        grad_hidden = tensor_parallel.sum_shards(grad_hidden, shard).to(hidden.dtype)
    nothing = hidden.new_empty
    return tuple(nothing(0) if g is None else g for g in (grad_hidden, grad_weight, grad_bias))  # type: ignore[return-value]


@linear_logprob_backward_op.register_fake
def _(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    nothing = hidden.new_empty
    inputs = zip((hidden, weight, bias), needs, strict=True)
    return tuple(torch.empty_like(x) if x is not None and needed else nothing(0) for x, needed in inputs)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, row_temperatures, *options, stats = inputs
    _, entropy, lse, *rest, hidden_grad = output
    if "hidden_grad" in stats and "entropy" not in stats:  # then it is all that the backward needs
        ctx.save_for_backward(*[None] * 7, hidden_grad)
    else:
        ctx.save_for_backward(hidden, weight, targets, bias, row_temperatures, lse, entropy, hidden_grad)
    ctx.options, ctx.stats, ctx.dtype = options, stats, inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, *rest, hidden_grad)


@once_differentiable  # a second derivative would take what the forward knew for a constant
def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    hidden, weight, targets, bias, row_temperatures, lse, entropy, hidden_grad = ctx.saved_tensors
    without = [None] * 7
    if "entropy" not in ctx.stats:
        grad_entropy = None  # compiled graphs hand zeros to what nobody asked for
    if grad_logprob is None and grad_entropy is None:
        return (None, None, None, None, *without)
    if grad_entropy is None and "hidden_grad" in ctx.stats:
        g = grad_logprob.unsqueeze(1)  # type: ignore[union-attr]
        return (g * hidden_grad).where(g != 0, 0.0).to(ctx.dtype), None, None, None, *without
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = linear_logprob_backward_op(
        grad_logprob, grad_entropy, lse, entropy, needs,
        hidden, weight, targets, bias, row_temperatures, *ctx.options,
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias = (g if n else None for g, n in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, *without


linear_logprob_op.register_autograd(_backward, setup_context=_save_for_backward)


def _transform(
    row_temperatures: Tensor | None, temperature: float, softcap: float | None, logit_scale: float
) -> LogitTransform:
    return LogitTransform(softcap, logit_scale, temperature if row_temperatures is None else row_temperatures)


@contextlib.contextmanager
def _plain(hidden: Tensor) -> Iterator[None]:
    """Without autocast, which would round float32 statistics, and on the device of `hidden`, for Triton."""
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        yield


def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels_for(implementation: str, hidden: Tensor) -> Kernels:
    """The kernels of an implementation, if it can compute with `hidden`. Raises ValueError or ImportError."""
    if implementation == "tiled":
        return Kernels(tiled.partial_stats, tiled.backward)
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

    return Kernels(triton_forward.partial_stats, triton_backward.backward)
