"""A head whose vocabulary is split over the ranks of a process group.

Each rank computes the statistics of its slice; what joins the slices of one GPU joins those of several. Ranks hold
slices in the order of their rank, of any sizes, and the same hidden states, targets and upstream gradients.
`hidden` needs a gradient on all of them or on none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from cme_kernels.stats import PartialStats, merge


@dataclass(frozen=True)
class Shard:
    """The slice [start, start + len(weight)) of a vocabulary of `vocab_size`; `group` is None for the whole."""

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None


def shard_of(weight: Tensor, group_name: str) -> Shard:
    """The slice of the vocabulary that this rank's rows are. Each rank must call it; it waits for the others.

    Raises ValueError, on all ranks, if one of them has no rows.
    """
    if not group_name:
        return Shard(0, len(weight))
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]  # what functional collectives do, too
    # [1] per rank: slices may differ in size, and targets are counted from a slice's start
    sizes = [torch.empty(1, dtype=torch.int64, device=weight.device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(weight)], device=weight.device), group=group)
    counts = torch.cat(sizes).tolist()
    if 0 in counts:
        raise ValueError(f"the ranks of the group hold {counts} rows of the vocabulary; each needs at least one")
    ends = list(itertools.accumulate(counts))
    return Shard(ends[group.rank()] - len(weight), ends[-1], group)


def merge_shards(partial: PartialStats, shard: Shard) -> PartialStats:
    """The statistics over the whole vocabulary, with the same bits on every rank."""
    if shard.group is None:
        return partial
    if partial.argmax is not None:
        partial.argmax = partial.argmax + shard.start
    # Gathered, not reduced: every rank merges the same parts in the same order, so all get the same bits
    parts: list[dict[str, Tensor]] = [{} for _ in range(shard.group.size())]
    for field in fields(PartialStats):
        value = getattr(partial, field.name)
        if value is not None:
            received = [torch.empty_like(value) for _ in parts]
            dist.all_gather(received, value.contiguous(), group=shard.group)
            for part, tensor in zip(parts, received, strict=True):
                part[field.name] = tensor
    return reduce(merge, (PartialStats(**part) for part in parts))


def sum_shards(grad_hidden: Tensor, shard: Shard) -> Tensor:
    """d loss / d hidden, of which each rank has the terms of its own slice. In place."""
    if shard.group is not None:
        # dL / dh = dx W is a sum over the vocabulary
        dist.all_reduce(grad_hidden, group=shard.group)
    return grad_hidden
