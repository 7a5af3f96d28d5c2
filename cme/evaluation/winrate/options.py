"""What a run of `cme eval winrate` is to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cme.evaluation.options import Generation

MAX_FAILURES = 0.01
"""Share of calls."""


@dataclass(frozen=True)
class OneResponse(Generation):
    """To each prompt, as comparisons have it."""

    samples: int = 1


@dataclass(frozen=True)
class Options:
    """Attributes:
    contestants: A, B, and perhaps a third: models or files of responses, `NAME=` first to call them so.
    output: folder.
    prompts: a file; None takes them from the first file of responses.
    limit: at most so many prompts, from the top.
    only_common: leave out prompts that someone did not answer, instead of stopping.
    generation: how models respond.
    model_options: for `cme.models.load_model`.
    judge_prompt: a file; None for the default.
    weighted: count the probabilities of the labels, not the verdicts; for judges that give them.
    max_failures: share of calls that may fail.
    retry_unparsable: ask again where an earlier run found no verdict in the answer.
    prices: US dollars for a million prompt tokens and a million completion tokens; None if they are not known.
    """

    contestants: tuple[str, ...]
    output: Path
    prompts: Path | None = None
    limit: int | None = None
    only_common: bool = False
    generation: Generation = OneResponse()
    model_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    judge_prompt: Path | None = None
    weighted: bool = False
    max_failures: float = MAX_FAILURES
    retry_unparsable: bool = False
    prices: tuple[float, float] | None = None
    progress: bool = True

    def settings(self) -> dict[str, Any]:
        """For the record, as JSON."""
        return {
            "contestants": list(self.contestants),
            "prompts": None if self.prompts is None else str(self.prompts),
            "limit": self.limit,
            "only_common": self.only_common,
            "generation": self.generation.settings(),
            "weighted": self.weighted,
            "max_failures": self.max_failures,
        }
