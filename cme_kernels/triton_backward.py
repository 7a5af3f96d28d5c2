"""Backward in Triton: the vocabulary in chunks, for all rows at once.

A kernel computes a chunk's logits again and writes d loss / d projection, in the dtype of the inputs, straight
from its registers. Library matmuls do the rest: a chunk of the weight gradient is complete after one product,
rounded once, and the gradient of the hidden states accumulates over the chunks in float32.
"""

# Notation as in `triton_forward`. L is the loss; per row, g = dL / d log p_t and u = dL / d entropy are given.
#
# 1. Softmax. log p_k = z_k - lse and d lse / d z_j = p_j, so
#        d log p_k / d z_j = 1[k = j] - p_j                 d p_k / d z_j = p_k (1[k = j] - p_j)
#
# 2. Entropy E = -sum_k p_k log p_k.
#        dE / d z_j = -sum_k (d p_k / d z_j) (log p_k + 1)
#                   = -p_j (log p_j + 1) + p_j sum_k p_k (log p_k + 1)
#                   = -p_j (log p_j + 1) + p_j (1 - E)
#                   = -p_j (log p_j + E)
#
# 3. Together: dL / d z_j = g 1[j = t] - p_j (g + u (log p_j + E)), from lse and E of the forward and from z_j,
#    which is computed again.
#
# 4. Softcap, scale and temperature.
#        z = outer tanh(inner x):   d z / d x = outer inner (1 - tanh^2(inner x)) = outer inner (1 - (z / outer)^2)
#                                             = (a / T) (1 - (z T / c)^2)
#        z = outer x:               d z / d x = outer = a / T
#    and dx_j = dL / d x_j = (dL / d z_j) (d z_j / d x_j), the matrix dx [N, V] over all rows.
#
# 5. Projection x = h W^T + b, all rows at once:
#        dL / dh = dx W      [N, H]   a sum over the vocabulary, so over the chunks
#        dL / dW = dx^T h    [V, H]   a sum over rows, so each chunk's part is complete
#        dL / db = dx^T 1    [V]      likewise; the kernel sums the rows of a tile while it has them

# Device code has no type annotations
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cme_kernels.stats import LogitTransform
from cme_kernels.triton_configs import backward_columns, tiles
from cme_kernels.triton_forward import (
    add_bias,
    clamp,
    exp,
    fits_tma,
    grouped_program,
    operand,
    project_tile,
    row_scale,
    transform_arguments,
    transform_logits,
    unit_stride,
)


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
    """Gradients with respect to hidden, weight and bias, where `needs` asks for them.

    The upstream gradients, `lse` and `entropy` have shape [N]. Beside the gradients this allocates a workspace of
    `triton_configs.BACKWARD_WORKSPACE` bytes (or one tile's width, if larger).
    """
    (n, hidden_size), vocab_size = hidden.shape, len(weight)
    config = tiles(hidden.device, hidden.dtype).backward
    row_tiles = triton.cdiv(n, config.rows)
    width = min(vocab_size, backward_columns(n, hidden.element_size(), config.columns))
    workspace = hidden.new_empty(n * width)  # one chunk of dx, [N, width]
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
    grad_weight = torch.zeros_like(weight) if needs[1] else None
    grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
    if n == 0:
        return grad_hidden, grad_weight, grad_bias
    hidden, strided_weight = unit_stride(hidden), unit_stride(weight)
    use_tma = config.tma and fits_tma(hidden) and fits_tma(strided_weight)
    outer, inner, temperatures = transform_arguments(transform)
    bias = None if bias is None else bias.contiguous()
    for start in range(0, vocab_size, width):
        chunk = slice(start, min(start + width, vocab_size))
        columns = chunk.stop - chunk.start
        dx = workspace[: n * columns].view(n, columns)
        bias_parts = None if grad_bias is None else torch.empty(row_tiles, columns, device=hidden.device)
        projection_grad_kernel[(row_tiles * triton.cdiv(columns, config.columns),)](
            operand(hidden, config.rows, config, use_tma),
            operand(strided_weight[chunk], config.columns, config, use_tma),
            None if bias is None else bias[chunk],
            temperatures,
            targets - start,
            lse,
            entropy,
            grad_logprob,
            grad_entropy,
            dx,
            bias_parts,
            n,
            columns,
            hidden_size,
            hidden.stride(0),
            strided_weight.stride(0),
            outer,
            inner,
            TMA=use_tma,
            **config.constants(hidden_size, hidden.dtype),
        )
        # Rule 5: dL / dh, dL / dW and dL / db of this chunk
        if grad_hidden is not None:
            add_product(grad_hidden, dx, weight[chunk])
        if grad_weight is not None:
            torch.mm(dx.T, hidden, out=grad_weight[chunk])
        if grad_bias is not None and bias_parts is not None:
            grad_bias[chunk] = bias_parts.sum(0)
    return grad_hidden, grad_weight, grad_bias


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for a float32 total, without rounding the product to the dtype of a and b first."""
    if total.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


@triton.jit
def projection_grad_kernel(
    hidden,  # [n_rows, hidden_size], a pointer or, with TMA, a tensor descriptor
    weight,  # [vocab_size, hidden_size], likewise; a chunk of the vocabulary, as are bias and targets below
    bias,  # [vocab_size] or None
    temperatures,  # [n_rows] or None
    targets,  # [n_rows], relative to the chunk
    lse,  # [n_rows]
    entropy,  # [n_rows]; used with grad_entropy only
    grad_logprob,  # [n_rows] or None
    grad_entropy,  # [n_rows] or None
    grad_projection,  # [n_rows, vocab_size], written
    bias_parts,  # [row tiles, vocab_size] or None, written: its sums over the rows of each tile
    n_rows,
    vocab_size,
    hidden_size,
    hidden_stride,
    weight_stride,
    outer,
    inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, column_tile = grouped_program(tl.cdiv(n_rows, ROWS), tl.cdiv(vocab_size, COLUMNS), GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    in_batch = rows < n_rows
    product = project_tile(
        hidden, weight, row_tile * ROWS, column_tile * COLUMNS, n_rows, vocab_size, hidden_size,
        hidden_stride, weight_stride, ROWS, COLUMNS, DEPTH, EVEN_DEPTH, TMA, PRECISION,
    )  # fmt: skip
    scale = outer
    if temperatures is not None:
        scale = row_scale(outer, temperatures, rows, in_batch)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_vocabulary = columns < vocab_size
    z = transform_logits(add_bias(product, bias, columns, vocab_size), scale, inner)

    # Rule 3: dL / d z_j = g 1[j = t] - p_j (g + u (log p_j + E)), the bracket first. All [ROWS, COLUMNS]
    log_p = z - tl.load(lse + rows, in_batch, other=0.0)[:, None]
    grad = tl.zeros_like(z)
    if grad_entropy is not None:
        log_p = clamp(log_p)
        g_entropy = tl.load(grad_entropy + rows, in_batch, other=0.0)
        grad -= g_entropy[:, None] * (log_p + tl.load(entropy + rows, in_batch, other=0.0)[:, None])
    if grad_logprob is not None:
        g_logprob = tl.load(grad_logprob + rows, in_batch, other=0.0)[:, None]
        grad -= g_logprob
    grad *= exp(log_p)
    if grad_logprob is not None:
        target = tl.load(targets + rows, in_batch, other=-1).to(tl.int32)
        grad += tl.where(columns[None, :] == target[:, None], g_logprob, 0.0)

    # Rule 4: d z / d x = outer inner (1 - (z / outer)^2), or outer
    if inner is not None:
        t = z / scale if scale is not None else z
        grad *= inner * (1.0 - t * t)
    if scale is not None:
        grad *= scale

    # 64 bits: N times the width of a chunk can exceed 2^31
    offset = rows.to(tl.int64)[:, None] * vocab_size + columns[None, :]
    valid = in_batch[:, None] & in_vocabulary[None, :]
    tl.store(grad_projection + offset, grad.to(grad_projection.dtype.element_ty), valid)
    if bias_parts is not None:
        column_sums = tl.sum(tl.where(in_batch[:, None], grad, 0.0), 0)
        tl.store(bias_parts + row_tile.to(tl.int64) * vocab_size + columns, column_sums, in_vocabulary)
