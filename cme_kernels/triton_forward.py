"""Forward in Triton: logits live in the registers of one tile, and only a few floats per row are ever written.

A program owns a tile of rows and a span of the vocabulary. It folds the span's logit tiles into the running
statistics of `stats.PartialStats` and writes them; a second kernel merges the spans of each row, in order.
"""

# Notation, for one row: h = hidden [H], w_j = row j of weight [V, H], b = bias [V], t = target,
# a = logit_scale, c = softcap, T = temperature.
#
# 1. Logits.
#        x_j = h . w_j + b_j                 the projection, accumulated in float32
#        z_j = a x_j / T                     without a softcap
#        z_j = c tanh(a x_j / c) / T         with one
#    Both are z = outer f(inner x): outer = c / T and inner = a / c with f = tanh, or outer = a / T and no f.
#
# 2. Statistics of a set of tokens. With m = max z_j and d_j = z_j - m <= 0:
#        s = sum exp(d_j)        e = sum exp(d_j) d_j        q = sum exp(d_j)^2
#    Over the whole vocabulary log p_j = d_j - log s, so that (`PartialStats.finalize`)
#        lse           = m + log s
#        log p_t       = (z_t - m) - log s
#        entropy       = -sum p_j log p_j = -sum p_j (d_j - log s) = log s - e / s
#        max_logprob   = -log s
#        log sum p_j^2 = log q - 2 log s
#
# 3. Another reference. Relative to a larger M, with delta = m - M <= 0 and r = exp(delta),
#        exp(z_j - M) = exp(d_j) r           and           z_j - M = d_j + delta, so
#        s -> s r        e -> sum exp(d_j) r (d_j + delta) = (e + s delta) r        q -> q r^2
#
# 4. Online. Disjoint sets relative to one M add, so a tile joins the running statistics by
#        M = max(m, max of the tile);  s = s r + sum exp(z_j - M);  e and q in the same way,
#    and spans join each other by rule 3 for each of them (`merge_kernel`, `stats.merge`). Exactly one set holds
#    the target: the others' z_t is -inf, and the maximum of all is z_t. Sets come in the order of token ids, so
#    the argmax changes only where a maximum is strictly larger: of equal logits the lowest id stays.
#    For s alone this is the online softmax of Milakov and Gimelshein (2018, arXiv:1805.02867).

# Device code has no type annotations
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cme_kernels.stats import LogitTransform, PartialStats, allocate
from cme_kernels.triton_configs import MERGE_ROWS, MERGE_SPANS, Tile, span_tiles, tiles


def partial_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: Sequence[str],
) -> PartialStats:
    """`tiled.partial_stats` on a GPU."""
    (n, hidden_size), vocab_size = hidden.shape, len(weight)
    merged = allocate((n,), stats, torch.float32, hidden.device)
    if n == 0:
        return merged
    config = tiles(hidden.device, hidden.dtype).forward
    width = span_tiles(vocab_size, config.columns)
    n_spans = triton.cdiv(vocab_size, width * config.columns)
    # [n_spans, N] each: at most 256 spans, so at most 256 x 4 bytes per row and statistic
    parts = allocate((n_spans, n), stats, torch.float32, hidden.device)
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    use_tma = config.tma and fits_tma(hidden) and fits_tma(weight)
    outer, inner, temperatures = transform_arguments(transform)
    bias = None if bias is None else bias.contiguous()
    span_kernel[(triton.cdiv(n, config.rows) * n_spans,)](
        operand(hidden, config.rows, config, use_tma),
        operand(weight, config.columns, config, use_tma),
        bias,
        temperatures,
        targets.contiguous(),
        parts.max,
        parts.sum_exp,
        parts.target_logit,
        parts.shifted,
        parts.sum_sq,
        parts.argmax,
        n,
        vocab_size,
        hidden_size,
        hidden.stride(0),
        weight.stride(0),
        outer,
        inner,
        SPAN_TILES=width,
        TMA=use_tma,
        **config.constants(hidden_size, hidden.dtype),
    )
    merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
        parts.max,
        parts.sum_exp,
        parts.target_logit,
        parts.shifted,
        parts.sum_sq,
        parts.argmax,
        merged.max,
        merged.sum_exp,
        merged.target_logit,
        merged.shifted,
        merged.sum_sq,
        merged.argmax,
        n,
        n_spans,
        SPANS=MERGE_SPANS,
        ROWS=MERGE_ROWS,
        enable_fp_fusion=True,
    )
    return merged


def unit_stride(x: Tensor) -> Tensor:
    """`x` with adjacent elements in each row; the rows may lie apart. Copies a transposed matrix."""
    return x if x.stride(1) == 1 else x.contiguous()


def fits_tma(x: Tensor) -> bool:
    """True if the tensor memory accelerator can address `x`: it counts in 16 bytes, and rows must not overlap."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(0) >= x.shape[1]


def operand(x: Tensor, rows: int, config: Tile, use_tma: bool) -> Tensor | TensorDescriptor:
    """`x` as the kernels take it: a descriptor of [rows, depth] blocks, or the tensor itself."""
    return TensorDescriptor.from_tensor(x, [rows, config.depth]) if use_tma else x


def transform_arguments(transform: LogitTransform) -> tuple[float | None, float | None, Tensor | None]:
    """(outer, inner, temperatures) for `transform_logits`; `outer` contains a temperature that is one number, and
    is None where it would multiply by 1."""
    softcap, logit_scale, temperature = transform.softcap, transform.logit_scale, transform.temperature
    outer = logit_scale if softcap is None else softcap  # a or c of the derivation above
    inner = None if softcap is None else logit_scale / softcap  # a / c
    if isinstance(temperature, Tensor):  # [N]: the kernels divide by it row by row
        return outer, inner, temperature.contiguous()
    outer /= temperature
    return None if outer == 1.0 else outer, inner, None


# n_rows is never specialised: a kernel compiled for a multiple of 16 could order its sums in another way,
# and a row's bits would depend on the batch it came in
@triton.jit(do_not_specialize=["n_rows"])
def span_kernel(
    hidden,  # [n_rows, hidden_size], a pointer or, with TMA, a tensor descriptor
    weight,  # [vocab_size, hidden_size], likewise
    bias,  # [vocab_size] or None
    temperatures,  # [n_rows] or None
    targets,  # [n_rows]
    part_max,  # this and the next five: [spans, n_rows], the fields of PartialStats
    part_sum_exp,
    part_target_logit,
    part_shifted,  # or None, like the two below
    part_sum_sq,
    part_argmax,
    n_rows,
    vocab_size,
    hidden_size,
    hidden_stride,
    weight_stride,
    outer,
    inner,
    SPAN_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, span = grouped_program(tl.cdiv(n_rows, ROWS), tl.cdiv(vocab_size, SPAN_TILES * COLUMNS), GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)  # [ROWS], as are all statistics below
    in_batch = rows < n_rows

    m = tl.full([ROWS], -float("inf"), tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    shifted = tl.zeros([ROWS], tl.float32)
    sum_sq = tl.zeros([ROWS], tl.float32)
    argmax = tl.zeros([ROWS], tl.int32)
    target_logit = tl.full([ROWS], -float("inf"), tl.float32)
    first_column = span * SPAN_TILES * COLUMNS
    for start in range(first_column, tl.minimum(first_column + SPAN_TILES * COLUMNS, vocab_size), COLUMNS):
        # x of the derivation, without the bias: [ROWS, COLUMNS]
        product = project_tile(
            hidden, weight, row_tile * ROWS, start, n_rows, vocab_size, hidden_size,
            hidden_stride, weight_stride, ROWS, COLUMNS, DEPTH, EVEN_DEPTH, TMA, PRECISION,
        )  # fmt: skip
        target = tl.load(targets + rows, in_batch, other=-1).to(tl.int32)
        holds_target = tl.max(((target >= start) & (target < start + COLUMNS)).to(tl.int32), 0) > 0
        scale = outer
        if temperatures is not None:
            scale = row_scale(outer, temperatures, rows, in_batch)
        # Four tiles of [ROWS, COLUMNS / 4], each folded before the next is looked at
        quarters = split_columns(product, ROWS, COLUMNS)
        for quarter in tl.static_range(4):
            columns = start + quarter * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            x = add_bias(quarters[quarter], bias, columns, vocab_size)
            z = transform_logits(x, scale, inner)
            # After the softcap: it would turn -inf into a logit of -softcap
            z = tl.where((columns < vocab_size)[None, :], z, -float("inf"))

            if holds_target:  # few tiles do, and the search costs as much as the sum
                at_target = columns[None, :] == target[:, None]
                target_logit = tl.maximum(target_logit, tl.max(tl.where(at_target, z, -float("inf")), 1))
            tile_max = tl.max(z, 1)
            if part_argmax is not None:
                first = tl.min(tl.where(z == tile_max[:, None], columns[None, :], 2147483647), 1)
                argmax = tl.where(tile_max > m, first, argmax)  # equal: the lower id stays
            # Rules 3 and 4: the running sums relative to new_max, plus those of this quarter
            new_max = tl.maximum(m, tile_max)
            shift, delta, r = rescaling(m, new_max)
            d = z - shift[:, None]  # [ROWS, COLUMNS / 4], at most 0
            if part_shifted is not None:
                d = clamp(d)
            p = exp(d)
            if part_shifted is not None:
                shifted = (shifted + sum_exp * delta) * r + tl.sum(p * d, 1)
            if part_sum_sq is not None:
                sum_sq = sum_sq * r * r + tl.sum(p * p, 1)
            sum_exp = sum_exp * r + tl.sum(p, 1)
            m = new_max

    # 64 bits: spans * N can exceed 2^31
    store_stats(
        span.to(tl.int64) * n_rows + rows, in_batch, m, sum_exp, target_logit, shifted, sum_sq, argmax,
        part_max, part_sum_exp, part_target_logit, part_shifted, part_sum_sq, part_argmax,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def merge_kernel(
    part_max,  # this and the next five: [n_spans, n_rows], the last three or None
    part_sum_exp,
    part_target_logit,
    part_shifted,
    part_sum_sq,
    part_argmax,
    out_max,  # this and the next five: [n_rows]
    out_sum_exp,
    out_target_logit,
    out_shifted,
    out_sum_sq,
    out_argmax,
    n_rows,
    n_spans,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # `stats.merge` for SPANS slices at a time, in the order of the vocabulary
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < n_rows
    m = tl.full([ROWS], -float("inf"), tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    shifted = tl.zeros([ROWS], tl.float32)
    sum_sq = tl.zeros([ROWS], tl.float32)
    argmax = tl.zeros([ROWS], tl.int64)
    target_logit = tl.full([ROWS], -float("inf"), tl.float32)
    for start in range(0, n_spans, SPANS):
        spans = start + tl.arange(0, SPANS)
        valid = (spans < n_spans)[:, None] & in_batch[None, :]
        offset = spans.to(tl.int64)[:, None] * n_rows + rows[None, :]
        # [SPANS, ROWS] each; past the last span stand the statistics of no token
        m_i = tl.load(part_max + offset, valid, other=-float("inf"))
        s_i = tl.load(part_sum_exp + offset, valid, other=0.0)
        target_i = tl.load(part_target_logit + offset, valid, other=-float("inf"))

        target_logit = tl.maximum(target_logit, tl.max(target_i, 0))
        chunk_max = tl.max(m_i, 0)
        if part_argmax is not None:
            argmax_i = tl.load(part_argmax + offset, valid, other=0)
            first = tl.min(tl.where(m_i == chunk_max[None, :], argmax_i, 2147483647), 0)
            argmax = tl.where(chunk_max > m, first, argmax)
        new_max = tl.maximum(m, chunk_max)
        # Rule 3 for what is merged already, and for each of the spans
        _, delta, r = rescaling(m, new_max)
        _, delta_i, r_i = rescaling(m_i, new_max[None, :])
        if part_shifted is not None:
            e_i = tl.load(part_shifted + offset, valid, other=0.0)
            shifted = (shifted + sum_exp * delta) * r + tl.sum((e_i + s_i * delta_i) * r_i, 0)
        if part_sum_sq is not None:
            q_i = tl.load(part_sum_sq + offset, valid, other=0.0)
            sum_sq = sum_sq * r * r + tl.sum(q_i * r_i * r_i, 0)
        sum_exp = sum_exp * r + tl.sum(s_i * r_i, 0)
        m = new_max

    store_stats(
        rows, in_batch, m, sum_exp, target_logit, shifted, sum_sq, argmax,
        out_max, out_sum_exp, out_target_logit, out_shifted, out_sum_sq, out_argmax,
    )  # fmt: skip


@triton.jit
def store_stats(
    offset,  # [ROWS], where each row's statistics stand in the tensors below
    in_batch,  # [ROWS]
    m,  # this and the next five: [ROWS], the fields of PartialStats
    sum_exp,
    target_logit,
    shifted,
    sum_sq,
    argmax,
    to_max,
    to_sum_exp,
    to_target_logit,
    to_shifted,  # or None, like the two below: a statistic that nobody asked for
    to_sum_sq,
    to_argmax,
):
    tl.store(to_max + offset, m, in_batch)
    tl.store(to_sum_exp + offset, sum_exp, in_batch)
    tl.store(to_target_logit + offset, target_logit, in_batch)
    if to_shifted is not None:
        tl.store(to_shifted + offset, shifted, in_batch)
    if to_sum_sq is not None:
        tl.store(to_sum_sq + offset, sum_sq, in_batch)
    if to_argmax is not None:
        tl.store(to_argmax + offset, argmax, in_batch)


@triton.jit
def rescaling(m, new_max):
    # Rule 3: s -> s r, e -> (e + s delta) r, q -> q r^2.
    # While every logit is -inf, new_max is too; relative to 0 then, since -inf - -inf is NaN.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    delta = clamp(m - shift)
    return shift, delta, exp(delta)


@triton.jit
def exp(d):
    # exp(d) = 2^(d log2 e). tl.exp keeps subnormal results, for three more instructions: nothing in a sum that
    # contains a 1
    return tl.exp2(d * 1.4426950408889634)


@triton.jit
def clamp(d):
    # d exp(d) tends to 0 at -inf, where it would be NaN; exp(-1e4) is 0 already, in float64 too. NaN stays: a
    # plain maximum would hide it
    return tl.maximum(d, -1e4, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def grouped_program(n_row_tiles, n_column_tiles, GROUP: tl.constexpr):
    # GROUP row tiles take a column tile one after the other, then the next one: all but the first find it in L2
    program = tl.program_id(0)
    first_row_tile = program // (GROUP * n_column_tiles) * GROUP
    group_rows = tl.minimum(n_row_tiles - first_row_tile, GROUP)
    within = program % (GROUP * n_column_tiles)
    return first_row_tile + within % group_rows, within // group_rows


@triton.jit
def project_tile(
    hidden,
    weight,
    first_row,
    first_column,
    n_rows,
    vocab_size,
    hidden_size,
    hidden_stride,
    weight_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # hidden @ weight.T, float32. Past the edges stands 0 or the last row again: the callers leave that out
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    if TMA:
        for start in range(0, hidden_size, DEPTH):
            a = hidden.load([first_row, start])
            b = weight.load([first_column, start])
            product = tl.dot(a, b.T, product, input_precision=PRECISION)
    else:
        # 64 bits: V * H can exceed 2^31
        rows = tl.minimum(first_row + tl.arange(0, ROWS), n_rows - 1).to(tl.int64)
        columns = tl.minimum(first_column + tl.arange(0, COLUMNS), vocab_size - 1).to(tl.int64)
        depth = tl.arange(0, DEPTH)
        a_pointers = hidden + rows[:, None] * hidden_stride + depth[None, :]
        b_pointers = weight + columns[None, :] * weight_stride + depth[:, None]
        for start in range(0, hidden_size, DEPTH):
            if EVEN_DEPTH:
                a = tl.load(a_pointers)
                b = tl.load(b_pointers)
            else:
                a = tl.load(a_pointers, (depth < hidden_size - start)[None, :], other=0.0)
                b = tl.load(b_pointers, (depth < hidden_size - start)[:, None], other=0.0)
            product = tl.dot(a, b, product, input_precision=PRECISION)
            a_pointers += DEPTH
            b_pointers += DEPTH
    return product


@triton.jit
def split_columns(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # The quarters of a [ROWS, COLUMNS] tile, left to right. Folding one after the other needs temporaries of a
    # quarter only; at 128x256 a whole tile spills. Each thread keeps its elements: no data moves
    left, right = halve(tile, ROWS, COLUMNS)
    a, b = halve(left, ROWS, COLUMNS // 2)
    c, d = halve(right, ROWS, COLUMNS // 2)
    return a, b, c, d


@triton.jit
def halve(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def add_bias(x, bias, columns, vocab_size):
    if bias is not None:
        x += tl.load(bias + columns, columns < vocab_size, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def row_scale(outer, temperatures, rows, in_batch):
    # The factor of `transform_logits` for each row, [ROWS, 1]
    return (outer / tl.load(temperatures + rows, in_batch, other=1.0))[:, None]


@triton.jit
def transform_logits(x, outer, inner):
    # z = outer tanh(inner x), or outer x. outer = softcap / T or logit_scale / T, inner = logit_scale / softcap
    if inner is not None:
        x = tanh(x * inner)
    if outer is not None:
        x *= outer
    return x


@triton.jit
def tanh(x):
    # 2 / (1 + exp(-2 |x|)) - 1 where that does not cancel, and below 0.55 a minimax polynomial. Relative error
    # about 3e-7. The device libraries' tanh is missing from the interpreter and costs more registers
    large = 2.0 / (1.0 + tl.exp(-2.0 * tl.abs(x))) - 1.0
    s = x * x
    small = x + x * (s * (-0.33332947 + s * (0.13320725 + s * (-0.05267181 + s * 0.01643757))))
    return tl.where(s < 0.3025, small, tl.where(x < 0, -large, large))
