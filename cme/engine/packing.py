"""Requests -> batches for one forward pass each: packs without padding, in which shared prefixes stand once.

A pack is one row of tokens cut into segments. A segment attends to its own tokens, causally, and to all of
its ancestors'. A group of G responses of T_g tokens to one prompt of P tokens becomes

    [prompt without its last token]  [last prompt token, response 1]  ...  [last prompt token, response G]

with the first segment the parent of the others: P - 1 + sum (1 + T_g - 1) tokens instead of sum (P + T_g).
Repeating the last prompt token costs G - 1 tokens and makes every hidden row predict exactly one target.
Prompts that begin alike (one system prompt, the same examples) have that beginning as a parent in turn, and a
response that shares nothing is one segment with its prompt. Segments stand in the order of a walk through the
tree, so that the descendants of each follow it without a gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cme.engine.plan import AttentionPlan, Segment
from cme.engine.prefixes import Prefix, shared_prefixes
from cme_kernels import IGNORE_INDEX


@dataclass(frozen=True)
class Request:
    """One response to score: token ids of the context and of what follows it."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a request needs at least one prompt token: the first response token follows it")
        if not self.response:
            raise ValueError("a request needs at least one response token")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """One forward pass, and the positions of the hidden states that predict response tokens.

    Attributes:
        inputs: keyword arguments of the backbone; `input_ids` has shape [B, L].
        rows: [N] positions in the flattened hidden states [B * L, H] that predict a response token.
        targets: [N] the tokens they predict.
        members: index of each request, in the order in which their rows follow each other.
        lengths: response tokens of each member; they sum to N.
    """

    inputs: dict[str, Any]
    rows: Tensor
    targets: Tensor
    members: list[int]
    lengths: list[int]


def make_batches(
    requests: Sequence[Request], max_tokens: int, device: torch.device, packed: bool = True
) -> Iterator[Batch]:
    """Batches of at most `max_tokens` tokens (more where one request alone is longer, or a shared prefix leaves
    less than half of them: then half as many beside it).

    Packs, in which requests share what their prompts have in common, or right-padded rows. Long requests come
    first among those that share a prefix, so sequences of similar shape stand side by side.
    """
    if packed:
        for builder in _build_packs(requests, max_tokens):
            yield builder.build(device)
        return
    # Longest first: rows of similar length stand side by side, and the first of a batch is as long as any
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i]))
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // len(requests[order[start]]))
        yield pad(requests, device, order[start : start + rows])
        start += rows


def pack(requests: Sequence[Request], device: torch.device) -> Batch:
    """One pack of all requests, however long it gets."""
    (builder,) = _build_packs(requests, None)
    return builder.build(device)


def pad(requests: Sequence[Request], device: torch.device, members: Sequence[int] | None = None) -> Batch:
    """One right-padded row per request: for models that cannot be packed."""
    chosen = list(range(len(requests)) if members is None else members)
    length = max(len(requests[i]) - 1 for i in chosen)  # the last response token predicts nothing
    tokens: list[list[int]] = []
    mask: list[list[int]] = []
    rows: list[int] = []
    targets: list[int] = []
    for row, i in enumerate(chosen):
        sequence = (*requests[i].prompt, *requests[i].response)[:-1]
        padding = length - len(sequence)
        # Token 0 is one of every vocabulary; behind a row's end it is in no other token's context
        tokens.append([*sequence, *[0] * padding])
        mask.append([1] * len(sequence) + [0] * padding)
        # The last prompt token predicts the first response token
        first = row * length + len(requests[i].prompt) - 1
        rows.extend(range(first, first + len(requests[i].response)))
        targets.extend(requests[i].response)
    inputs = {
        "input_ids": torch.tensor(tokens, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "position_ids": torch.arange(length, device=device).expand(len(chosen), length),
    }
    lengths = [len(requests[i].response) for i in chosen]
    return Batch(inputs, torch.tensor(rows, device=device), torch.tensor(targets, device=device), chosen, lengths)


def empty_batch(device: torch.device) -> Batch:
    """A forward pass with nothing to score: what a rank runs to keep step with the others."""
    nothing = pack([Request((0,), (0,))], device)
    return Batch(nothing.inputs, nothing.rows, torch.full_like(nothing.targets, IGNORE_INDEX), [], [])


def _build_packs(requests: Sequence[Request], max_tokens: int | None) -> Iterator[_PackBuilder]:
    """Walk the tree of prefixes and start a pack wherever one is full. A prefix that is cut is paid for again, so
    requests that fit one pack together do not begin in the rest of another."""
    limit = math.inf if max_tokens is None else max_tokens

    def capacity(node: Prefix) -> float:
        # Beside a prefix that leaves less, half of the limit all the same, or each response would pay for it anew
        return max(limit, node.length + limit / 2)

    builder = _PackBuilder(requests)
    # The last response token predicts nothing, so it is not fed
    root = shared_prefixes((r.prompt[:-1] for r in requests), [len(r) - 1 for r in requests])
    paths: list[tuple[Prefix, ...]] = [(root,)]  # depth first, each from the root to a node
    while paths:
        path = paths.pop()
        node = path[-1]
        whole = builder.missing(path) + node.subtree_tokens
        fits_another = capacity(node) >= node.length + node.subtree_tokens
        if builder.members and len(builder.tokens) + whole > limit and fits_another:
            yield builder
            builder = _PackBuilder(requests)
        for i in node.members:
            tokens = builder.missing(path) + len(requests[i]) - 1 - node.length
            most = capacity(node) if node in builder.segment_of else limit
            if builder.members and len(builder.tokens) + tokens > most:
                yield builder
                builder = _PackBuilder(requests)
            builder.add(path, i)
        paths.extend((*path, child) for child in reversed(node.children))
    if builder.members:
        yield builder


class _PackBuilder:
    """A pack that requests are added to one by one."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.segment_of: dict[Prefix, Segment] = {}
        self.rows: list[int] = []
        self.targets: list[int] = []
        self.members: list[int] = []
        self.lengths: list[int] = []

    def missing(self, path: Sequence[Prefix]) -> int:
        """Tokens of the last prefix of `path` that the pack does not have yet."""
        have = max((prefix.length for prefix in path if prefix in self.segment_of), default=0)
        return path[-1].length - have

    def add(self, path: Sequence[Prefix], i: int) -> None:
        """Add request i, and those prefixes of `path`, from the root to its own, that are not there."""
        parent = None
        for above, prefix in pairwise(path):
            if prefix not in self.segment_of:
                tokens = prefix.context[above.length : prefix.length]
                self.segment_of[prefix] = self._add_segment(tokens, parent)
            parent = self.segment_of[prefix]
        # The rest of the prompt, with its last token, and the response; each of its last T tokens predicts one
        request = self.requests[i]
        self._add_segment((*request.prompt, *request.response)[path[-1].length : -1], parent)
        self.rows.extend(range(len(self.tokens) - len(request.response), len(self.tokens)))
        self.targets.extend(request.response)
        self.members.append(i)
        self.lengths.append(len(request.response))

    def _add_segment(self, tokens: Sequence[int], parent: Segment | None) -> Segment:
        segment = Segment(len(self.tokens), len(tokens), parent)
        self.tokens.extend(tokens)
        self.positions.extend(range(segment.offset, segment.offset + len(tokens)))
        self.segments.append(segment)
        return segment

    def build(self, device: torch.device) -> Batch:
        inputs = {
            "input_ids": torch.tensor([self.tokens], device=device),
            "position_ids": torch.tensor([self.positions], device=device),
            # transformers hands a 4-D mask on as it is, so no [L, L] mask is built; the plan replaces it
            "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device),
            "cme_plan": AttentionPlan(tuple(self.segments)),
        }
        rows = torch.tensor(self.rows, device=device)
        return Batch(inputs, rows, torch.tensor(self.targets, device=device), self.members, self.lengths)
