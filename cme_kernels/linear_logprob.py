"""The public function: arguments are checked, gathered and cast, then the operator runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from cme_kernels import checks, reference
from cme_kernels.custom_op import linear_logprob_op, triton_available
from cme_kernels.stats import LogitTransform, TokenStats

Implementation = Literal["reference", "tiled", "triton"]


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
    group: dist.ProcessGroup | None = None,
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
        temperature: positive and finite; one number or a tensor [N]. Not differentiable. On CUDA a row whose
            entry in a tensor is neither becomes NaN.
        stats: which of "entropy", "lse", "max_logprob", "argmax", "log_sum_sq_probs" to compute as well.
        implementation: "triton" (default on CUDA and ROCm), "tiled" (torch; default elsewhere), or
            "reference" (float64 from full logits, for tests).
        group: the vocabulary is split over these ranks, each with its own slice of `weight` and `bias`, in the
            order of the ranks; the slices' sizes may differ. `hidden`, `targets` (ids in the whole vocabulary),
            options, upstream gradients, and whether `hidden` needs a gradient are the same on all of them, and
            so are the results. The gradient of `hidden` is the sum over the slices. All ranks must make the
            call; each waits for the device, to learn the sizes.

    Returns:
        TokenStats, each field of shape [N]; what was not asked for is None.

    Raises:
        IndexError: a target outside the vocabulary, on CPU. On CUDA that row is NaN instead, because a
            check would wait for the device.
        ValueError: shapes, dtypes or options that do not fit; the message names the value.
    """
    checks.check_placement(hidden, weight, group)
    weight = _gather(weight)
    bias = None if bias is None else _gather(bias)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
    checks.check_arguments(hidden, weight, targets, bias, softcap, logit_scale, temperature, stats, group)
    row_temperatures = None
    if isinstance(temperature, Tensor):  # [] or [N]; an operator's argument is either a number or a tensor
        row_temperatures = temperature.to(hidden.device, torch.promote_types(hidden.dtype, torch.float32))
        row_temperatures, temperature = row_temperatures.expand(len(hidden)), 1.0
    if implementation == "reference":
        if group is not None:
            raise ValueError("implementation='reference' has no group")
        checks.check_values(targets, len(weight), row_temperatures)
        transform = LogitTransform(
            softcap, logit_scale, temperature if row_temperatures is None else row_temperatures
        )
        return reference.token_stats(hidden, weight, targets, bias, transform, stats)
    implementation = implementation or _default_implementation(hidden)
    values = linear_logprob_op(
        [*stats, *_for_backward(hidden, weight, bias, stats, implementation, group)],
        hidden, weight, targets, bias, row_temperatures,
        float(temperature), softcap, float(logit_scale),
        implementation, "" if group is None else group.group_name,
    )  # fmt: skip
    asked = {"logprob", *stats}
    return TokenStats(**{n: v for n, v in zip(TokenStats.names(), values, strict=False) if n in asked})


def _for_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Sequence[str],
    implementation: str,
    group: dist.ProcessGroup | None,
) -> list[str]:
    """Outputs beside `stats` that the forward must compute for the backward to start from."""
    head_is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_is_trained or hidden.requires_grad):
        return []
    # With a frozen head dL / dh = g d log p_t / dh, which needs no g to be computed: one product in the forward
    # instead of two in the backward
    shortcut = implementation == "tiled" and group is None and not head_is_trained
    return ["hidden_grad"] * shortcut + ["lse"] * ("lse" not in stats)


def _default_implementation(hidden: Tensor) -> Implementation:
    return "triton" if hidden.is_cuda and hidden.dtype != torch.float64 and triton_available() else "tiled"


def _gather(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # Each rank has the gradient of its own rows. The default would take them for equal and keep a slice of one
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch does: float64 stays
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
