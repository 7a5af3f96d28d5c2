"""A radix tree over the token ids of requests: its nodes are the beginnings that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

MIN_SAVED = 8
"""Fewest tokens that a prefix must save to be a segment of its own: one more attention call per layer costs about
as much as a few tokens."""


@dataclass(eq=False)
class Prefix:
    """Tokens with which the contexts of several requests begin.

    The context of a request is its prompt without the last token, which each response repeats.

    Attributes:
        context: a context that begins with the prefix.
        length: tokens of the prefix, its parent's included; the root's is 0.
        children: longer prefixes that begin with this one, those of long requests first.
        members: indices of the requests that share no longer prefix, long ones first.
        subtree_tokens: tokens that all requests of the prefix need after it, each longer prefix counted once.
        longest: tokens of its longest request.
    """

    context: tuple[int, ...]
    length: int
    children: list[Prefix] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    subtree_tokens: int = 0
    longest: int = 0

    def saved(self, parent: Prefix) -> int:
        """Tokens that computing it once saves, of those that `parent` does not have already."""
        return (len(self.children) + len(self.members) - 1) * (self.length - parent.length)


def shared_prefixes(contexts: Iterable[tuple[int, ...]], lengths: Sequence[int]) -> Prefix:
    """The tree of all prefixes that save at least MIN_SAVED tokens; its root is the empty prefix.

    Args:
        contexts: token ids of each request's context.
        lengths: tokens that a forward pass over each request alone would have.
    """
    root = _radix_tree(contexts)
    for node in reversed(list(_preorder(root))):  # children before their parents
        kept: list[Prefix] = []
        for child in node.children:
            # A prefix that saves too little leaves its requests and longer prefixes to its parent
            if child.saved(node) >= MIN_SAVED:
                kept.append(child)
            else:
                kept.extend(child.children)
                node.members.extend(child.members)
        node.children = sorted(kept, key=lambda child: -child.longest)
        node.members.sort(key=lambda i: -lengths[i])
        node.longest = max([child.longest for child in kept] + [lengths[i] for i in node.members], default=0)
        own = sum(lengths[i] - node.length for i in node.members)
        node.subtree_tokens = own + sum(
            child.length - node.length + child.subtree_tokens for child in node.children
        )
    return root


def _radix_tree(contexts: Iterable[tuple[int, ...]]) -> Prefix:
    """A node for every context, and for every prefix after which contexts differ."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, context in enumerate(contexts):
        members.setdefault(context, []).append(i)
    root = Prefix((), 0)
    path = [root]  # to the context before, in lexicographic order
    for context in sorted(members):
        # In this order all that share a prefix stand together, so what has left the path never comes back
        common = _common_length(path[-1].context, context)
        passed = None
        while path[-1].length > common:
            passed = path.pop()
        if path[-1].length < common:  # they part within an edge: a node where they do
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
    # No recursion: a chain of prefixes may be longer than Python's limit
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))
