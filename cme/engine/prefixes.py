"""What requests have in common at their beginnings: a tree over their token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MIN_SAVED = 8
"""Fewest tokens that a prefix of its own must save: an attention call more costs about as much as a few tokens."""


class Request(Protocol):
    """What the tree needs of a request."""

    @property
    def prompt(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...


@dataclass(eq=False)
class Prefix:
    """Tokens with which the contexts of several requests begin.

    The context of a request is its prompt without the last token, which each response repeats.

    Attributes:
        context: a context that begins with the prefix.
        length: tokens of the prefix, its parent's included; the root's is 0.
        children: prefixes that begin with this one, those of long requests first.
        members: indices of the requests that go on alone after this prefix, long ones first.
        below: tokens that all requests of the prefix need after it, those of a longer prefix counted once.
        longest: tokens of its longest request.
    """

    context: tuple[int, ...]
    length: int
    children: list[Prefix] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    below: int = 0
    longest: int = 0

    def saved(self, parent: Prefix) -> int:
        """Tokens that computing it once saves."""
        return (len(self.children) + len(self.members) - 1) * (self.length - parent.length)


def shared_prefixes(requests: Sequence[Request]) -> Prefix:
    """The tree of all prefixes that save at least MIN_SAVED tokens; its root is the empty prefix."""
    root = _radix_tree(requests)
    for node in reversed(list(_preorder(root))):  # children before their parents
        kept: list[Prefix] = []
        for child in node.children:
            if child.saved(node) >= MIN_SAVED:
                kept.append(child)
            else:
                kept.extend(child.children)
                node.members.extend(child.members)
        node.children = sorted(kept, key=lambda child: -child.longest)
        node.members.sort(key=lambda i: -len(requests[i]))
        node.longest = max([child.longest for child in kept] + [len(requests[i]) for i in node.members], default=0)
        own = sum(len(requests[i]) - 1 - node.length for i in node.members)  # the last token predicts nothing
        node.below = own + sum(child.length - node.length + child.below for child in node.children)
    return root


def _radix_tree(requests: Sequence[Request]) -> Prefix:
    """A node for every context, and for every prefix after which contexts differ."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        members.setdefault(request.prompt[:-1], []).append(i)
    root = Prefix((), 0)
    path = [root]  # to the context before, in lexicographic order
    for context in sorted(members):
        common = _common_length(path[-1].context, context)
        passed = None
        while path[-1].length > common:
            passed = path.pop()
        if path[-1].length < common:
            assert passed is not None
            fork = Prefix(context, common, [passed])
            path[-1].children[-1] = fork
            path.append(fork)
        if path[-1].length < len(context):
            leaf = Prefix(context, len(context))
            path[-1].children.append(leaf)
            path.append(leaf)
        path[-1].members = members[context]
    return root


def _common_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is much faster than comparing tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _preorder(root: Prefix) -> Iterator[Prefix]:
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))
