"""What a run of `cme eval winrate` is to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cme.evaluation.generate import Sampling
from cme.evaluation.winrate.generated import Generation

MAX_FAILURES = 0.01
"""Share of calls."""


@dataclass(frozen=True)
class Options:
    """Attributes:
    contestants: A, B, and perhaps a third: models or files of responses, `NAME=` first to call them so.
    output: folder.
    prompts: a file; None takes them from the first file of responses.
    limit: at most so many prompts, from the top.
    only_common: leave out prompts that someone did not answer, instead of stopping.
    judge_prompt: a file; None for the default.
    max_failures: share of calls that may fail.
    retry_unparsable: ask again where an earlier run found no verdict in the answer.
    prices: US dollars for a million prompt tokens and a million completion tokens; None if they are not known.
    """

    contestants: tuple[str, ...]
    output: Path
    prompts: Path | None = None
    limit: int | None = None
    only_common: bool = False
    generation: Generation = field(default_factory=lambda: Generation(Sampling(samples=1, max_new_tokens=512)))
    judge_prompt: Path | None = None
    max_failures: float = MAX_FAILURES
    retry_unparsable: bool = False
    prices: tuple[float, float] | None = None
    progress: bool = True

    def settings(self) -> dict[str, Any]:
        """For the record, as JSON."""
        sampling = self.generation.sampling
        how: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "batch_size": sampling.batch_size}
        if not self.generation.greedy:
            how |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        return {
            "contestants": list(self.contestants),
            "prompts": None if self.prompts is None else str(self.prompts),
            "limit": self.limit,
            "only_common": self.only_common,
            "generation": {"greedy": self.generation.greedy, "template": self.generation.template, **how},
            "max_failures": self.max_failures,
        }
