"""The progress of a run, and its counts and means at the end."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from cme.files.tables import Malformed
from cme.score_file.columns import AddedColumns

MAX_LISTED = 20
"""Malformed lines, and kinds of reasons, that are listed; the rest are counted."""


class Progress:
    """A bar of rows, with response tokens per second. Within a chunk it moves with the responses."""

    def __init__(self, rows: int, done: int, shown: bool) -> None:
        """`done` of the `rows` were scored in an earlier session."""
        self._bar = tqdm(total=rows, initial=done, desc="scoring", unit="row", disable=not shown)
        self._start = time.monotonic()
        self._tokens = 0
        self._done = float(done)
        self._rows_each = 0.0
        self._ahead = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def begin_chunk(self, rows: int, responses: int) -> None:
        """`responses` are about to be scored, each once for every verifier, in `rows`."""
        self._rows_each = rows / max(1, responses)
        self._ahead = 0

    def scored(self, responses: int) -> None:
        self._ahead += responses * self._rows_each
        self._bar.update(int(self._done + self._ahead) - self._bar.n)

    def end_chunk(self, rows: int, tokens: int) -> None:
        self._done += rows
        self._tokens += tokens
        rate = self._tokens / (time.monotonic() - self._start)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(int(self._done) - self._bar.n)

    def rate(self) -> str:
        """Tokens and time of this session, for the summary."""
        seconds = time.monotonic() - self._start
        return f"{self._tokens:,} response tokens in {seconds:,.1f} s ({self._tokens / seconds:,.0f} per second)"


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

    columns: AddedColumns
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
        """Count `rows`, of added values, while they pass."""
        for row in rows:
            self.rows += 1
            if not isinstance(row, Malformed):
                self._add({name: value if isinstance(value, list) else [value] for name, value in row.items()})
            else:
                self.num_malformed += 1
                self.malformed += [row] if len(self.malformed) < MAX_LISTED else []
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
