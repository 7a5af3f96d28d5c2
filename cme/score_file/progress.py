"""The progress bar: rows, the time left, response tokens per second."""

from __future__ import annotations

import time

from tqdm import tqdm


class Progress:
    """Moves within a chunk with the responses that are scored, so that it does not stand still for a whole one."""

    def __init__(self, rows: int, done: int, shown: bool) -> None:
        """`done` of the `rows` were scored in an earlier session."""
        self._bar = tqdm(total=rows, initial=done, desc="scoring", unit="row", disable=not shown)
        self._start = time.monotonic()
        self._tokens = 0
        self._done = done
        self._rows_each = 0.0
        self._scored = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def begin_chunk(self, rows: int, responses: int) -> None:
        """`responses` are about to be scored, each once for every verifier, in `rows`."""
        self._rows_each = rows / max(1, responses)
        self._scored = 0

    def scored(self, responses: int) -> None:
        self._scored += responses
        self._move_to(self._done + int(self._scored * self._rows_each))

    def end_chunk(self, rows: int, tokens: int) -> None:
        self._done += rows
        self._tokens += tokens
        rate = self._tokens / (time.monotonic() - self._start)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._move_to(self._done)

    def rate(self) -> str:
        """What this session did, for the summary."""
        seconds = time.monotonic() - self._start
        return f"{self._tokens:,} response tokens in {seconds:,.1f} s ({self._tokens / seconds:,.0f} per second)"

    def _move_to(self, row: int) -> None:
        self._bar.update(row - self._bar.n)
