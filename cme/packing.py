"""Requests -> batches for one forward pass: each prompt once, its responses after it, no padding.

A pack is one row of tokens cut into segments. A segment attends to its own tokens, causally, and to all of
its parent's. A group of G responses to one prompt becomes

    [prompt without its last token]  [last prompt token, response 1]  ...  [last prompt token, response G]

with the first segment the parent of the others: P - 1 + sum (1 + T_g - 1) tokens instead of sum (P + T_g).
Repeating the last prompt token costs G - 1 tokens and makes every hidden row predict exactly one target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cme.attention import AttentionPlan, Segment
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
    """One forward pass, and where to read the log-probabilities off.

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
    """Batches of at most `max_tokens` tokens (more only where one request alone is longer), long requests first.

    Packs, in which requests with equal prompts share it, or right-padded rows. Sorting by length puts sequences
    of similar shape side by side, and memory peaks in the first batch.
    """
    if packed:
        for members in _fill(_groups(requests), requests, max_tokens):
            yield pack(requests, device, members)
        return
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i]))
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // len(requests[order[start]]))
        yield pad(requests, device, order[start : start + rows])
        start += rows


def pack(requests: Sequence[Request], device: torch.device, members: Sequence[int] | None = None) -> Batch:
    """One pack of the requests listed in `members` (default all), however long it gets."""
    chosen = range(len(requests)) if members is None else members
    builder = _PackBuilder()
    for group in _groups([requests[i] for i in chosen]):
        builder.add_group([chosen[i] for i in group], requests)
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
        tokens.append([*sequence, *[0] * padding])
        mask.append([1] * len(sequence) + [0] * padding)
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


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of requests with equal prompts, long prompts first, and long responses first within a group."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        by_prompt.setdefault(request.prompt, []).append(i)
    for group in by_prompt.values():
        group.sort(key=lambda i: -len(requests[i].response))
    return sorted(by_prompt.values(), key=lambda group: -len(requests[group[0]]))


def _fill(groups: list[list[int]], requests: Sequence[Request], max_tokens: int) -> Iterator[list[int]]:
    """Cut the groups, in order, into packs. A group that is cut pays for its prompt again."""
    members: list[int] = []
    used = 0
    for group in groups:
        prompt_paid = False
        for i in group:
            response = len(requests[i].response)
            cost = response + (0 if prompt_paid else len(requests[i].prompt) - 1)
            if members and used + cost > max_tokens:
                yield members
                members, used = [], 0
                cost = len(requests[i])
            members.append(i)
            used += cost
            prompt_paid = True
    if members:
        yield members


class _PackBuilder:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.rows: list[int] = []
        self.targets: list[int] = []
        self.members: list[int] = []
        self.lengths: list[int] = []

    def add_group(self, group: Sequence[int], requests: Sequence[Request]) -> None:
        """Requests with one prompt: the prompt, then each response."""
        *shared, last = requests[group[0]].prompt
        parent = self._add_segment(shared, None) if shared else None
        for i in group:
            response = requests[i].response
            segment = self._add_segment([last, *response[:-1]], parent)
            self.rows.extend(range(segment.start, segment.start + segment.length))
            self.targets.extend(response)
            self.members.append(i)
            self.lengths.append(len(response))

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
            "cme_plan": AttentionPlan.of(self.segments, device),
        }
        rows = torch.tensor(self.rows, device=device)
        return Batch(inputs, rows, torch.tensor(self.targets, device=device), self.members, self.lengths)
