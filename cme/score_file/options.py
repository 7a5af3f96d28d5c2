"""What a run of `cme score` is to do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cme.errors import CMEError
from cme.files.records import Columns

CHUNK_ROWS = 1024
"""Most rows in a chunk."""

MAX_CHUNK_CHARACTERS = 2**18
"""Text in a chunk, however many rows: a chunk is what an interruption loses."""


@dataclass(frozen=True)
class VerifierName:
    """A verifier as the columns and as `from_pretrained` call it."""

    name: str
    model: str


@dataclass(frozen=True)
class Options:
    """Attributes:
    input, output: files; their suffixes say the format.
    verifiers: at least one.
    prompt_column, response_column, messages_column, finished_column: None finds the usual names.
    span_column: [start, end) or a text in the response, which is scored alone too.
    all_finished: every response ended by itself.
    score_end_of_turn: score the token that ends the turn, of responses that ended by themselves.
    tokens: add a column with every token.
    prefix: of the added columns.
    template, chat_template_kwargs, dtype, device, device_map, trust_remote_code: of every verifier.
    max_batch_tokens: most tokens in a forward pass. None is what the run began with, which goes by the memory that
        was free then.
    overwrite: forget an earlier output, finished or not.
    chunk_rows: most rows that are scored, and kept on disk, together.
    progress: show a bar.
    """

    input: Path
    output: Path
    verifiers: tuple[VerifierName, ...]
    prompt_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None
    finished_column: str | None = None
    span_column: str | None = None
    all_finished: bool = False
    score_end_of_turn: bool = False
    tokens: bool = False
    prefix: str = ""
    template: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    max_batch_tokens: int | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    chunk_rows: int = CHUNK_ROWS
    progress: bool = True

    @property
    def columns(self) -> Columns:
        """Where the input has what."""
        return Columns(**{f.name: getattr(self, f.name) for f in fields(Columns)})

    def identity(self) -> dict[str, Any]:
        """What a continuation must have in common with the run that it continues."""
        free = {"input", "output", "verifiers", "trust_remote_code", "overwrite", "progress", "max_batch_tokens"}
        free |= {"device", "device_map"}  # of which the verifiers' fingerprints have what matters
        settings = {name: value for name, value in vars(self).items() if name not in free}
        settings["chat_template_kwargs"] = json.dumps(dict(self.chat_template_kwargs), sort_keys=True)
        return {**settings, "verifier": {v.name: v.model for v in self.verifiers}}


def name_verifiers(values: Sequence[str]) -> tuple[VerifierName, ...]:
    """From `MODEL`, which is called by the last part of its path, or `NAME=MODEL`.

    Raises CMEError if two have one name.
    """
    verifiers = tuple(_named(value) for value in values)
    names = [verifier.name for verifier in verifiers]
    for name in names:
        if names.count(name) > 1:
            raise CMEError(
                f"two verifiers are called {name!r}: give them names, --verifier a=MODEL --verifier b=MODEL"
            )
    return verifiers


def _named(value: str) -> VerifierName:
    match = re.fullmatch(r"([\w.-]+)=(.+)", value)
    if match and not Path(value).exists():
        return VerifierName(match[1], match[2])
    return VerifierName(Path(value).resolve().name if Path(value).is_dir() else value.rsplit("/", 1)[-1], value)
