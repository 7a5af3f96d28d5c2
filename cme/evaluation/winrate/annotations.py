"""AlpacaEval's annotations: `output_1` is the reference's, `output_2` the model's, and `preference` is 1 for the
first, 2 for the second, 1.5 for a tie, anything between for a judge that gives probabilities, null for a failure.

Here the model is A and the reference B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cme.errors import DatasetError
from cme.evaluation.winrate.inputs import Prompt, read_list
from cme.evaluation.winrate.outcomes import Outcome
from cme.evaluation.winrate.template import shown

Names = tuple[str, str]
"""Of A and B."""


def read(path: Path) -> dict[Names, list[Outcome]]:
    """The outcomes in a file, by who is compared. Raises DatasetError if it holds something else."""
    entries = read_list(path)
    if not entries:
        raise DatasetError(f"{path} is empty: it has no annotations")
    outcomes: dict[Names, list[Outcome]] = {}
    for number, entry in enumerate(entries, 1):
        names = str(entry.get("generator_2", "A")), str(entry.get("generator_1", "B"))
        outcome = Outcome(
            share=_share(entry, f"entry {number} of {path}"),
            length_a=_length(entry.get("output_2")),
            length_b=_length(entry.get("output_1")),
            identical=entry.get("output_1") is not None and entry.get("output_1") == entry.get("output_2"),
        )
        outcomes.setdefault(names, []).append(outcome)
    return outcomes


def to_entries(
    prompts: Sequence[Prompt],
    outcomes: Sequence[Outcome],
    names: Names,
    responses: tuple[Mapping[str, str], Mapping[str, str]],
    annotator: str,
) -> list[dict[str, Any]]:
    """The annotations of one comparison. `preference` is the mean over both orders."""
    a, b = responses
    return [
        {
            "id": prompt.id,
            "dataset": prompt.dataset,
            "instruction": shown(prompt.prompt),
            "generator_1": names[1],
            "output_1": b[prompt.id],
            "generator_2": names[0],
            "output_2": a[prompt.id],
            "annotator": annotator,
            "preference": None if outcome.share is None else 1 + outcome.share,
            "verdict_model_shown_first": outcome.orders[0] if outcome.orders else None,
            "verdict_reference_shown_first": outcome.orders[1] if outcome.orders else None,
        }
        for prompt, outcome in zip(prompts, outcomes, strict=True)
    ]


def _share(entry: Mapping[str, Any], where: str) -> float | None:
    if "preference" not in entry:
        raise DatasetError(f"{where} has no preference: is it a file of annotations, not of outputs?")
    value = entry["preference"]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or 1 <= value <= 2):
        raise DatasetError(f"{where} has the preference {value!r}: it must be a number from 1 to 2, or null")
    return 0.5 if value == 0 else value - 1  # early annotations have 0 for a tie


def _length(output: Any) -> int | None:
    return len(output) if isinstance(output, str) else None
