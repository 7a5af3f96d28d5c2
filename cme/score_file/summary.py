"""What is said about a finished run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cme.files.tables import Malformed
from cme.score_file.columns import Columns

MAX_LISTED = 20
"""Malformed lines, and kinds of reasons, that are listed; the rest are counted."""


@dataclass
class Summary:
    """Counts of a whole run, over all sessions in which it was worked on.

    Attributes:
        rows: of the input, malformed lines included.
        responses: in those rows.
        scored: responses that every verifier scored.
        reasons: why responses could not be scored, with how many; numbers and quotations left out.
        malformed, num_malformed: the first of the lines that hold no row, and how many there are.
        sums: of each signal, with the number of responses that have it.
        session: speed of the last session.
    """

    columns: Columns
    session: str = ""
    rows: int = 0
    responses: int = 0
    scored: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    malformed: list[Malformed] = field(default_factory=list)
    num_malformed: int = 0
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}

    def observe(self, rows: Iterable[dict[str, Any] | Malformed]) -> Iterator[dict[str, Any] | Malformed]:
        """Pass `rows`, of added values, on and count them."""
        for row in rows:
            self.rows += 1
            if isinstance(row, Malformed):
                self.num_malformed += 1
                if len(self.malformed) < MAX_LISTED:
                    self.malformed.append(row)
            else:
                lists = {name: value if isinstance(value, list) else [value] for name, value in row.items()}
                self._add(lists)
            yield row

    def _add(self, row: Mapping[str, list[Any]]) -> None:
        # A response's own reasons come before those of a span in it, which is no less scored for that
        reasons = [row[self.columns.name(verifier, "unscorable")] for verifier in self.columns.verifiers]
        for several in zip(*reasons, strict=True):
            self.responses += 1
            found = [reason for reason in several if reason is not None]
            self.scored += not found
            self.reasons.update(_kind(reason) for reason in found[:1])
        for name, kind in self.columns.kinds.items():
            if kind == "number" and not name.endswith("perplexity"):  # whose mean is that of the worst responses
                values = [value for value in row[name] if value is not None]
                total, count = self.sums.get(name, (0.0, 0))
                if values:
                    self.sums[name] = (total + sum(values), count + len(values))

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows, {self.responses:,} responses, {self.scored:,} scored"]
        lines += [f"  {count:,} not scored: {reason}" for reason, count in self.reasons.most_common(MAX_LISTED)]
        if self.num_malformed:
            lines.append(f"  {self.num_malformed:,} malformed lines, which the output leaves out:")
            lines += [f"    line {m.line:,}: {m.reason}" for m in self.malformed]
            if self.num_malformed > len(self.malformed):
                lines.append(f"    and {self.num_malformed - len(self.malformed):,} more")
        width = max(map(len, self.sums), default=0)
        lines += ["means over the scored responses:"] if self.sums else []
        lines += [f"  {name.ljust(width)}  {mean:10.4f}" for name, mean in self.means.items()]
        return "\n".join([*lines, self.session])


def _kind(reason: str) -> str:
    """The reason without what differs from response to response."""
    return re.sub(r"(?<![A-Za-z0-9])\d+", "N", re.sub(r"(?<!\w)'[^']*'", "'…'", reason))
