"""`linear_logprob` as operators of torch: one opaque node for torch.compile, with a gradient of its own.

An operator has a fixed number of outputs, none of them None: what was not asked for has no elements. The public
wrapper turns that into a `TokenStats`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cme_kernels import checks, tensor_parallel, tiled
from cme_kernels.stats import IGNORE_INDEX, LogitTransform, PartialStats, TokenStats, outside


class Inputs(NamedTuple):
    """Arguments of both operators, the last in their schemas. `linear_logprob.linear_logprob` explains them."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], this rank's slice of the vocabulary
    targets: Tensor  # [N], ids in the whole vocabulary
    bias: Tensor | None  # [V]
    row_temperatures: Tensor | None  # [N], in the place of `temperature`
    temperature: float
    softcap: float | None
    logit_scale: float
    implementation: str
    group: str  # the name of a process group, or empty

    @property
    def transform(self) -> LogitTransform:
        temperature = self.temperature if self.row_temperatures is None else self.row_temperatures
        return LogitTransform(self.softcap, self.logit_scale, temperature)


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?", str: "str"}
_INPUTS = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in get_type_hints(Inputs).items())
_TENSORS = 5
"""The first fields of `Inputs`, tensors or None, are saved for the backward; the others are options."""


class Kernels(NamedTuple):
    """Functions of an implementation; `tiled` documents their signatures."""

    partial_stats: Callable[..., PartialStats]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


@torch.library.custom_op(
    "cme::linear_logprob",
    mutates_args=(),
    schema=f"(str[] stats, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_logprob_op(stats: Sequence[str], *inputs: Any) -> tuple[Tensor, ...]:
    """The fields of `TokenStats`, in order, then d logprob / d hidden [N, H].

    The last if `stats` has "hidden_grad", which only "tiled" knows.
    """
    x = Inputs(*inputs)
    shard = tensor_parallel.shard_of(x.weight, x.group)
    if x.hidden.device.type == "cpu":  # on a GPU a check would wait for the device
        checks.check_values(x.targets, shard.vocab_size, x.row_temperatures)
    elif x.row_temperatures is not None:
        good = (x.row_temperatures > 0) & (x.row_temperatures < torch.inf)
        x = x._replace(row_temperatures=x.row_temperatures.where(good, torch.nan))
    kernels = kernels_for(x.implementation, x.hidden)
    with _plain(x.hidden):
        # A target of another rank is outside the slice, so its logit stays -inf here and the merge finds it there
        partial = kernels.partial_stats(x.hidden, x.weight, x.targets - shard.start, x.bias, x.transform, stats)
    # [N] per statistic, of this rank's slice -> of the whole vocabulary
    partial = tensor_parallel.merge_shards(partial, shard)
    out = partial.finalize(x.targets, stats, shard.vocab_size)
    nothing = partial.max.new_empty
    values = [nothing(0) if (v := getattr(out, name)) is None else v for name in TokenStats.names()]
    if "hidden_grad" in stats:
        return *values, tiled.hidden_grad(partial, x.weight, x.targets, x.transform)
    return *values, nothing(0)


@linear_logprob_op.register_fake
def _(stats: Sequence[str], hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
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
    grad_logprob: Tensor | None,  # [N], like the next three
    grad_entropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias where `needs` asks for them, else tensors without elements."""
    x = Inputs(*inputs)
    shard = tensor_parallel.shard_of(x.weight, x.group)
    if grad_logprob is not None:
        # A log-probability that is NaN has no gradient to be multiplied with
        lost = outside(x.targets, shard.vocab_size) & (grad_logprob != 0)
        grad_logprob = grad_logprob.masked_fill(lost, torch.nan)
    upstream = (grad_logprob, grad_entropy)
    # Clipped tokens and groups without advantage have no gradient, so they need no logits either
    live = x.targets != IGNORE_INDEX
    live &= torch.stack([g != 0 for g in upstream if g is not None]).any(0)
    rows = live.nonzero().squeeze(1)  # [M], M <= N
    with _plain(x.hidden):
        grad_hidden, grad_weight, grad_bias = kernels_for(x.implementation, x.hidden).backward(
            *(None if g is None else g[rows] for g in upstream),
            x.hidden[rows],
            x.weight,
            x.targets[rows] - shard.start,
            x.bias,
            x.transform.rows(rows),
            lse[rows],
            None if grad_entropy is None else entropy[rows],
            tuple(needs),
        )
    if grad_hidden is not None:
        # [M, H] -> [N, H]; summed over the ranks in float32, and only then rounded
        grad_hidden = torch.zeros_like(x.hidden, dtype=grad_hidden.dtype).index_copy_(0, rows, grad_hidden)
        grad_hidden = tensor_parallel.sum_shards(grad_hidden, shard).to(x.hidden.dtype)
    return _without_none(grad_hidden, grad_weight, grad_bias, like=x.hidden)


@linear_logprob_backward_op.register_fake
def _(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    x = Inputs(*inputs)
    operands = zip((x.hidden, x.weight, x.bias), needs, strict=True)
    grads = (torch.empty_like(v) if v is not None and needed else None for v, needed in operands)
    return _without_none(*grads, like=x.hidden)


def _without_none(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, *, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = like.new_empty
    return tuple(nothing(0) if g is None else g for g in (hidden, weight, bias))  # type: ignore[return-value]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stats, *arguments = inputs
    _, entropy, lse, *rest, hidden_grad = output
    tensors: list[Tensor | None] = [*arguments[:_TENSORS], lse, entropy]
    if "hidden_grad" in stats and "entropy" not in stats:  # then it is all that the backward needs
        tensors = [None] * len(tensors)
    ctx.save_for_backward(*tensors, hidden_grad)
    # dtype, because a frozen head saves no hidden states to read it from
    ctx.options, ctx.stats, ctx.dtype = arguments[_TENSORS:], stats, arguments[0].dtype
    # A statistic that is only logged has no gradient: None instead of zeros, which would cost the backward a term
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, *rest, hidden_grad)


@once_differentiable  # a second derivative would take what the forward knew for a constant
def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    *tensors, lse, entropy, hidden_grad = ctx.saved_tensors
    if "entropy" not in ctx.stats:
        grad_entropy = None  # compiled graphs hand zeros to what nobody asked for
    if grad_logprob is None and grad_entropy is None:
        return _grads_of_inputs()
    if grad_entropy is None and "hidden_grad" in ctx.stats:
        # dL / dh = g d log p_t / dh, where a row without gradient must not inherit a NaN
        g = grad_logprob.unsqueeze(1)  # type: ignore[union-attr]
        return _grads_of_inputs(hidden=(g * hidden_grad).where(g != 0, 0.0).to(ctx.dtype))
    operands = ("hidden", "weight", "bias")
    needs = [ctx.needs_input_grad[1 + Inputs._fields.index(name)] for name in operands]  # `stats` comes first
    grads = linear_logprob_backward_op(grad_logprob, grad_entropy, lse, entropy, needs, *tensors, *ctx.options)
    return _grads_of_inputs(**{name: g for name, g, n in zip(operands, grads, needs, strict=True) if n})


def _grads_of_inputs(**grads: Tensor) -> tuple[Tensor | None, ...]:
    """One for each argument of `linear_logprob_op`."""
    return None, *(grads.get(name) for name in Inputs._fields)


linear_logprob_op.register_autograd(_backward, setup_context=_save_for_backward)


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
    # Imported last: without Triton, or before it is asked for, everything else works
    from cme_kernels import triton_backward, triton_forward

    return Kernels(triton_forward.partial_stats, triton_backward.backward)
