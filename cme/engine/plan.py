"""Attention of a pack: the segments that attend to each other, as index tensors for each way to compute it.

`AttentionPlan` has the segments. It hands out `buckets` (padded batches for SDPA), `sequences` (cumulative lengths
for variable-length kernels and flex attention) and a `cascade` (slices of the pack). Each of them is built when it
is first asked for, and then serves every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128
"""Queries, and keys, of a block that flex attention takes or passes over as a whole. 128 is its own default."""

MAX_GATHERED = 16384
"""Most keys that the rows of a bucket gather together, so that their copies stay small beside the weights."""


class AttentionOptions(NamedTuple):
    """Settings of one attention layer."""

    scale: float
    window: int | None = None  # tokens that a query sees, itself included
    softcap: float | None = None  # bound of the scores
    dropout: float = 0.0
    sinks: Tensor | None = None  # [Hq], scores of a key with value 0

    @property
    def explicit(self) -> bool:
        """True if it is more than SDPA computes."""
        return self.softcap is not None or self.sinks is not None


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive tokens of a pack. They see each other causally, and every token of their ancestors.

    Attributes:
        start: index of the first token in the pack.
        offset: position of the first token in its sequence, which is also the number of ancestor tokens.
    """

    start: int
    length: int
    parent: Segment | None = None
    offset: int = field(init=False)

    def __post_init__(self) -> None:
        # Computed once: chains of parents may be a thousand segments long
        above = 0 if self.parent is None else self.parent.offset + self.parent.length
        object.__setattr__(self, "offset", above)

    @property
    def end(self) -> int:
        return self.start + self.length

    def lineage(self) -> list[Segment]:
        """The segment and its ancestors, from the root on."""
        path: list[Segment] = []
        segment: Segment | None = self
        while segment is not None:
            path.append(segment)
            segment = segment.parent
        return path[::-1]

    def keys(self) -> Tensor:
        """Indices in the pack of all tokens that the segment's last token sees, by position."""
        return torch.cat([torch.arange(s.start, s.end) for s in self.lineage()])


@dataclass(frozen=True)
class Bucket:
    """Segments of similar shape, padded to one: the batch of one attention call.

    Attributes:
        queries, keys: [B, Lq], [B, Lk], indices in the pack; padding repeats the segment's last token.
        query_positions, key_positions: [B, Lq], [B, Lk]; keys are in order of position, so a key's position
            is its column. Padding keys lie beyond every query.
        causal: every row is a whole sequence, so that plain top-left causal attention is right.
    """

    queries: Tensor
    keys: Tensor
    query_positions: Tensor
    key_positions: Tensor
    causal: bool
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, window: int | None) -> Tensor | None:
        """`visible`, or None where causal attention needs no mask."""
        cuts = window is not None and window < self.keys.shape[1]
        return self.visible(window) if cuts or not self.causal else None

    def visible(self, window: int | None) -> Tensor:
        """[B, 1, Lq, Lk], true where a query sees a key. Kept: it is the same for every layer with this window."""
        if window is not None and window >= self.keys.shape[1]:
            window = None
        if window not in self._masks:
            query, key = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
            seen = key <= query
            self._masks[window] = seen if window is None else seen & (key > query - window)
        return self._masks[window]


@dataclass(frozen=True)
class Cascade:
    """The same attention without masks and copies of keys: the keys of a token's own segment, and those of each
    ancestor, are separate calls on slices of the pack.

    Attributes:
        own: (start, B, T): from `start` on, B segments of T tokens each.
        shared: (start, end, stop): tokens [end, stop) descend from the segment [start, end).
    """

    own: tuple[tuple[int, int, int], ...]
    shared: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Sequences:
    """N sequences of queries and of the keys they see, as flash-attn's variable-length kernels take them.

    Attributes:
        keys: [Lk] indices in the pack.
        cu_queries, cu_keys: [N + 1] int32, cumulative lengths (cu_seqlens).
        max_queries, max_keys: the largest lengths.
    """

    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """The arguments that variable-length kernels take after queries, keys and values."""
        return self.cu_queries, self.cu_keys, self.max_queries, self.max_keys

    @staticmethod
    def of(lengths: list[int], keys: list[Tensor], device: torch.device) -> Sequences:
        """From the number of queries and the keys of each sequence."""
        counts = [len(k) for k in keys]
        cu_queries, cu_keys = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in (lengths, counts))
        return Sequences(torch.cat(keys).to(device), cu_queries, cu_keys, max(lengths), max(counts))

    def visible(self, window: int | None) -> tuple[Tensor, Tensor]:
        """[Lq] each: the first and the last gathered key that a query sees, and with them all between."""
        index = torch.arange(len(self.cu_queries) - 1, device=self.keys.device)
        sequence = index.repeat_interleave(self.cu_queries.diff())
        first, end = self.cu_keys[sequence], self.cu_keys[sequence + 1]  # [Lq]
        # The last query of a sequence sees its last key, the query before it the key before, and so on
        query = torch.arange(len(sequence), device=self.keys.device, dtype=first.dtype)
        last = end - self.cu_queries[sequence + 1] + query
        return (first if window is None else torch.maximum(first, last - window + 1)), last

    def block_mask(self, window: int | None) -> BlockMask:
        """`visible` for flex attention. Kept: it is the same for every layer with this window."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import BlockMask

            # `first` and `last` rise with the query, so a block of queries sees consecutive blocks of keys, from
            # that of its first query's `first` to that of its final query's `last`
            first, last = self.visible(window)
            final = torch.arange(FLEX_BLOCK - 1, len(last) + FLEX_BLOCK - 1, FLEX_BLOCK).clamp(max=len(last) - 1)
            lowest, highest = first[::FLEX_BLOCK] // FLEX_BLOCK, last[final.to(last.device)] // FLEX_BLOCK
            total = -(-len(self.keys) // FLEX_BLOCK)
            blocks = torch.arange(total, device=last.device, dtype=lowest.dtype)
            # Row i lists the blocks from lowest[i] on; flex attention reads as many as the first argument says
            self._block_masks[window] = BlockMask.from_kv_blocks(
                (highest - lowest + 1)[None, None],
                ((lowest[:, None] + blocks) % total)[None, None],
                BLOCK_SIZE=FLEX_BLOCK,
                mask_mod=lambda batch, head, query, key: (first[query] <= key) & (key <= last[query]),
                seq_lengths=(len(last), len(self.keys)),
            )
        return self._block_masks[window]


class AttentionPlan:
    """The attention of a pack of L tokens.

    Attributes:
        segments: in the order of the pack, the descendants of each right after it.
    """

    # No dataclass: FSDP and its like copy those among their inputs, segment by segment, to move the tensors in
    # them, and each layer would build its own buckets
    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments
        self._layouts: dict[torch.device, tuple[tuple[Bucket, ...], Tensor]] = {}
        self._sequences: dict[torch.device, Sequences] = {}

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, ancestors included."""
        return max(s.offset + s.length for s in self.segments)

    def buckets(self, device: torch.device) -> tuple[tuple[Bucket, ...], Tensor]:
        """Attention calls whose queries together cover every token, and an index [L]: where each token's output
        stands among the concatenated outputs of the calls. A model may have layers on several devices."""
        if device not in self._layouts:
            order = torch.empty(self.segments[-1].end, dtype=torch.int64)  # [L]
            base, buckets = 0, []
            for members in _bucket_by_shape(self.segments):
                width = max(s.length for s in members)
                for s in members:
                    order[s.start : s.end] = torch.arange(base, base + s.length)
                    base += width
                buckets.append(_pad_to_bucket(members, device))
            self._layouts[device] = tuple(buckets), order.to(device)
        return self._layouts[device]

    def sequences(self, device: torch.device) -> Sequences:
        """Each segment's queries and the keys that it sees, for back ends that take the pack in one call."""
        if device not in self._sequences:
            keys = [s.keys() for s in self.segments]
            self._sequences[device] = Sequences.of([s.length for s in self.segments], keys, device)
        return self._sequences[device]

    @cached_property
    def cascade(self) -> Cascade:
        """Slices for attention without masks."""
        own: list[tuple[int, int, int]] = []
        stop: dict[Segment, int] = {}
        for s in self.segments:
            # Neighbours of one length, such as a group's responses, are one batch
            start, count, length = own[-1] if own else (0, 0, 0)
            if length == s.length:
                own[-1] = (start, count + 1, length)
            else:
                own.append((s.start, 1, s.length))
            for ancestor in s.lineage()[:-1]:
                stop[ancestor] = s.end
        return Cascade(tuple(own), tuple((s.start, s.end, stop[s]) for s in self.segments if s in stop))


def _bucket_by_shape(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Split segments into buckets in which no row's scores are more than half padding."""
    buckets: list[list[Segment]] = []
    rows = columns = 0  # Lq, Lk of the open bucket
    for s in sorted(segments, key=lambda s: (s.parent is None, s.offset + s.length, s.length), reverse=True):
        fits = (
            len(buckets) > 0
            # Roots need no mask, so they stay among themselves
            and (buckets[-1][0].parent is None) == (s.parent is None)
            and 2 * s.length * (s.offset + s.length) >= rows * columns
            and (len(buckets[-1]) + 1) * columns <= MAX_GATHERED
        )
        if not fits:
            buckets.append([])
            rows, columns = 0, s.offset + s.length
        buckets[-1].append(s)
        rows = max(rows, s.length)
    return buckets


def _pad_to_bucket(segments: Sequence[Segment], device: torch.device) -> Bucket:
    def rows(values: list[Tensor], padding: list[int]) -> Tensor:
        width = max(len(v) for v in values)
        padded = [F.pad(v, (0, width - len(v)), value=p) for v, p in zip(values, padding, strict=True)]
        return torch.stack(padded).to(device)

    width = max(s.offset + s.length for s in segments)  # Lk
    last = [s.end - 1 for s in segments]
    seen = [s.offset + s.length for s in segments]
    return Bucket(
        queries=rows([torch.arange(s.start, s.end) for s in segments], last),
        keys=rows([s.keys() for s in segments], last),
        query_positions=rows(
            [torch.arange(s.offset, n) for s, n in zip(segments, seen, strict=True)], [n - 1 for n in seen]
        ),
        key_positions=rows([torch.arange(n) for n in seen], [width] * len(segments)),
        causal=all(s.parent is None for s in segments),
    )
