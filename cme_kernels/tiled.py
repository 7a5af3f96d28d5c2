"""The torch twin of the Triton kernels: the same algebra, tile by tile, on any device.

A full [N, V] matrix of logits never exists; a tile of it does, small enough to stay in a CPU's cache while
the statistics are read off it. The product is the bare matmul of the two slices, so the loop runs at its speed.
The algebra is derived at the top of `triton_forward` and `triton_backward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from cme_kernels.stats import IGNORE_INDEX, LogitTransform, PartialStats, allocate, merge, outside

ROWS, COLUMNS = 1024, 4096
"""Shape of a tile, 16 MiB of float32. The product packs the weight once for all rows of a tile: with 256 rows it
took up to 1.2 times as long on the CPUs tried. For bfloat16 and float16 inputs a [COLUMNS, H] copy of the weight
in float32 comes on top: a product in their own dtype would round the logits."""


def partial_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: Sequence[str],
) -> PartialStats:
    """Softmax statistics of each row over the whole of `weight`, with the fields that `stats` needs. No autograd.

    `targets` are row numbers of `weight`; those outside it have the target logit -inf. With "hidden_grad" among
    `stats` there is `weighted_row`, too, for one more product of the same size.
    """
    n, vocab_size = len(hidden), len(weight)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if n == 0:
        nothing = allocate((0,), stats, dtype, hidden.device)
        nothing.weighted_row = hidden.to(dtype) if "hidden_grad" in stats else None
        return nothing
    tile = _Tile(hidden, weight, bias, transform, dtype)
    # [ROWS * COLUMNS]: the entropy needs d and exp(d) at once
    scratch = torch.empty_like(tile.buffer)
    rows = list(_blocks(n, ROWS))
    running: list[PartialStats] = []
    for columns in _blocks(vocab_size, COLUMNS):  # vocabulary outside: the weight is read once
        weight_tile = weight[columns].to(dtype)  # [v, H], v <= COLUMNS
        for i, block in enumerate(rows):
            z = tile.logits(block, columns, weight_tile)  # [n, v], n <= ROWS
            partial = _tile_stats(z, scratch, targets[block], columns, stats, weight_tile, transform.rows(block))
            if columns.start == 0:
                running.append(partial)
            else:
                running[i] = merge(running[i], partial)
    return _concatenate(running)


def backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    lse: Tensor,
    entropy: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to hidden (float32), weight and bias (their dtypes), where `needs` asks for them.

    The upstream gradients, `lse` and `entropy` have shape [N]. Every sum over rows or over the vocabulary
    accumulates in float32 and is rounded once, to the dtype of its input.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    tile = _Tile(hidden, weight, bias, transform, dtype)
    scratch = torch.empty_like(tile.buffer)
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
    grad_weight = torch.empty_like(weight) if needs[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and needs[2] else None
    for columns in _blocks(len(weight), COLUMNS):
        weight_tile = weight[columns].to(dtype)
        grad_weight_tile = torch.zeros_like(weight_tile) if needs[1] else None
        grad_bias_tile = weight_tile.new_zeros(len(weight_tile)) if grad_bias is not None else None
        for block in _blocks(len(hidden), ROWS):
            z = tile.logits(block, columns, weight_tile)
            dx = _grad_projection(
                z,
                scratch,
                targets[block],
                columns,
                transform.rows(block),
                lse[block],
                None if grad_logprob is None else grad_logprob[block],
                None if grad_entropy is None else grad_entropy[block],
                None if entropy is None else entropy[block],
            )
            # dL / dh = dx W adds up over the columns; dL / dW = dx^T h and dL / db over the rows
            if grad_hidden is not None:
                grad_hidden[block].addmm_(dx, weight_tile)
            if grad_weight_tile is not None:
                grad_weight_tile.addmm_(dx.T, hidden[block].to(dtype))
            if grad_bias_tile is not None:
                grad_bias_tile.add_(dx.sum(0))
        if grad_weight is not None and grad_weight_tile is not None:
            grad_weight[columns] = grad_weight_tile
        if grad_bias is not None and grad_bias_tile is not None:
            grad_bias[columns] = grad_bias_tile
    return grad_hidden, grad_weight, grad_bias


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class _Tile:
    """Final logits of one tile at a time, all in the same buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.bias, self.transform, self.dtype = hidden, bias, transform, dtype
        size = min(ROWS, len(hidden)) * min(COLUMNS, len(weight))
        self.buffer = torch.empty(size, dtype=dtype, device=hidden.device)

    def logits(self, block: slice, columns: slice, weight_tile: Tensor) -> Tensor:
        hidden = self.hidden[block].to(self.dtype)
        z = self.buffer[: len(hidden) * len(weight_tile)].view(len(hidden), len(weight_tile))
        torch.mm(hidden, weight_tile.T, out=z)
        if self.bias is not None:
            z.add_(self.bias[columns])
        return self.transform.rows(block).apply_(z)


def _tile_stats(
    z: Tensor,
    scratch: Tensor,
    targets: Tensor,
    columns: slice,
    stats: Sequence[str],
    weight_tile: Tensor,
    transform: LogitTransform,
) -> PartialStats:
    # Overwrites z; `scratch` is a flat buffer of at least its size. dz / dx must be read off before that
    slope = transform.derivative(z) if "hidden_grad" in stats else None
    if "argmax" in stats:
        maximum, argmax = z.max(1)
        argmax = argmax + columns.start
    else:
        maximum, argmax = z.amax(1), None
    local = targets - columns.start  # [n]
    inside = (local >= 0) & (local < z.shape[1])
    target_logit = z.gather(1, local.where(inside, 0).unsqueeze(1)).squeeze(1)
    target_logit = target_logit.masked_fill_(~inside, -torch.inf)
    z.sub_(maximum.where(maximum > -torch.inf, 0.0).unsqueeze(1))  # d = z - m, and -inf - 0 = -inf
    if "entropy" in stats:
        # e = sum d exp(d): exp(-inf) * -inf would be NaN where its limit is 0
        z.clamp_(min=-1e4)
        p = torch.exp(z, out=scratch[: z.numel()].view_as(z))
        shifted = z.mul_(p).sum(1)
    else:
        p, shifted = z.exp_(), None
    # s = sum p, q = sum p^2 and sum_j p_j (dz / dx)_j w_j, with p = exp(d) relative to this tile's maximum
    return PartialStats(
        max=maximum,
        sum_exp=p.sum(1),
        target_logit=target_logit,
        shifted=shifted,
        sum_sq=torch.linalg.vecdot(p, p) if "log_sum_sq_probs" in stats else None,
        argmax=argmax,
        weighted_row=None if slope is None else p.mul_(slope) @ weight_tile,
    )


def hidden_grad(partial: PartialStats, weight: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    """d log p_t / d hidden [N, H], from the statistics of the whole vocabulary.

    With z_j = f(x_j) and x_j = hidden . w_j it is f'(x_t) w_t - sum_j p_j f'(x_j) w_j: known without an upstream
    gradient, which multiplies it. For a frozen head that saves the backward the logits and a product.
    """
    assert partial.weighted_row is not None
    valid = (targets >= 0) & (targets < len(weight))
    at_target = weight[targets.where(valid, 0)].to(partial.max.dtype) * transform.derivative(
        partial.target_logit.unsqueeze(1)
    )
    grad = at_target - partial.weighted_row / partial.sum_exp.unsqueeze(1)
    return grad.masked_fill((targets == IGNORE_INDEX).unsqueeze(1), 0.0).masked_fill(
        outside(targets, len(weight)).unsqueeze(1), torch.nan
    )


def _grad_projection(
    z: Tensor,
    scratch: Tensor,
    targets: Tensor,
    columns: slice,
    transform: LogitTransform,
    lse: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """d loss / d projection of one tile, from its final logits z, in the memory of z.

    d log p_t / d z_j = 1[j = t] - p_j        d entropy / d z_j = -p_j (log p_j + entropy)
    """
    slope = transform.derivative(z)  # dz / dx, from z before it is overwritten
    log_p = z.sub_(lse.unsqueeze(1))  # [n, v]
    if grad_entropy is None:
        # -g p, in one buffer instead of two
        assert grad_logprob is not None
        grad = log_p.exp_().mul_(-grad_logprob.unsqueeze(1))
    else:
        assert entropy is not None
        p = torch.exp(log_p, out=scratch[: z.numel()].view_as(z))
        # -p (u (log p + E) + g). The clamp keeps p log p at 0 where log p is -inf
        grad = log_p.clamp_(min=-1e4).add_(entropy.unsqueeze(1)).mul_(-grad_entropy.unsqueeze(1))
        if grad_logprob is not None:
            grad.sub_(grad_logprob.unsqueeze(1))
        grad.mul_(p)
    if grad_logprob is not None:
        # + g 1[j = t], in the tile that holds the target
        local = targets - columns.start
        inside = (local >= 0) & (local < z.shape[1])
        at_target = grad_logprob.where(inside, 0.0).unsqueeze(1)
        grad.scatter_add_(1, local.where(inside, 0).unsqueeze(1), at_target)
    return grad if isinstance(slope, float) and slope == 1.0 else grad.mul_(slope)


def _concatenate(parts: list[PartialStats]) -> PartialStats:
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(PartialStats)}
    return PartialStats(**{name: torch.cat(v) for name, v in columns.items() if v[0] is not None})
