"""JSON as every reader of it understands it."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import chain
from typing import Any

MAX_NESTING = 100
"""Lists and objects within each other in a value."""


class NotTaken(ValueError):
    """The reason that JSON is refused although a lenient reader would take it."""


def parse_json(text: str) -> Any:
    """The value of a text.

    Raises:
        NotTaken: NaN, an infinity, a number beyond a float's range, an object with one key twice, or more than
            MAX_NESTING lists and objects within each other.
        ValueError: no JSON at all.
    """
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)
    except RecursionError:
        raise NotTaken(f"nested more than {MAX_NESTING} deep") from None
    # Independent of how much of the interpreter's stack happens to be in use
    if text.count("[") + text.count("{") > MAX_NESTING and _depth(value) > MAX_NESTING:
        raise NotTaken(f"nested more than {MAX_NESTING} deep")
    return value


def finite(value: Any) -> Any:
    """The value with None in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def why(error: ValueError) -> str:
    """An error of decoding or parsing in words for a user."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start + 1}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (character {error.pos + 1})"
    return f"not readable: {error}"


def _constant(text: str) -> float:
    raise NotTaken(f"{text} is no number in JSON (null is for what has no value)")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotTaken(f"the number {text:.40} is beyond the range of a float")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise NotTaken(f"an object has the key {twice[:40]!r} twice")
    return found


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while containers := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = list(chain.from_iterable(c.values() if isinstance(c, dict) else c for c in containers))
    return depth
