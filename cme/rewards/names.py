"""The names that `--reward` takes, and the options after them. Nothing heavy is imported: help texts need it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cme.errors import CMEError


def _no_option(text: str) -> None:
    if text:
        raise ValueError("it takes no option; the models are named by --verifier and --model-name-or-path")


def _weight(text: str) -> float:
    weight = float(text or 1)
    if not math.isfinite(weight):
        raise ValueError("the weight must be a finite number")
    return weight


def _seed(text: str) -> int:
    return int(text or 0)


def _models(text: str) -> tuple[str, ...]:
    models = tuple(name.strip() for name in text.split(",") if name.strip())
    if not models:
        raise ValueError("name at least one verifier beside --verifier")
    return models


@dataclass(frozen=True)
class Reward:
    """A reward that `--reward` names.

    Attributes:
        read: makes the option of the text after the name's colon; raises ValueError.
        needs_policy: it scores the model in training.
        needs_whole_response: it sets the verifier's tokens beside all of the policy's, thoughts included.
        option: as it was given, such as 0.5 in `pmi:0.5`.
    """

    name: str
    help: str
    read: Callable[[str], Any] = _no_option
    metavar: str = ""
    needs_policy: bool = False
    needs_whole_response: bool = False
    option: Any = None


DENSE = "cme-dense"

REWARDS = {
    reward.name: reward
    for reward in (
        Reward("cme", "mean log-likelihood under the verifier"),
        Reward(DENSE, "CME with an advantage per token, given alone", needs_whole_response=True),
        Reward("length", "shorter is better"),
        Reward("majority", "share of the group with the same short answer"),
        Reward("self-certainty", "of the generator's distributions", needs_policy=True),
        Reward("entropy", "of the generator's distributions, less is better", needs_policy=True),
        Reward("log-ratio", "of verifier to generator: reverse KL", needs_policy=True, needs_whole_response=True),
        Reward("verifier-entropy", "less is better"),
        Reward("pmi", "likelihood minus WEIGHT times that without the question", _weight, "[:WEIGHT]"),
        Reward("random-verifier", "likelihood under untrained weights", _seed, "[:SEED]"),
        Reward("cme-min", "least likelihood per byte under several verifiers", _models, ":MODEL,..."),
        Reward("cme-mean", "their mean; each MODEL as with --verifier-template auto", _models, ":MODEL,..."),
    )
}

HELP = (
    "What is rewarded, one or several of: "
    + "; ".join(f"'{name}{reward.metavar}' ({reward.help})" for name, reward in REWARDS.items())
    + ". Several are weighted by --reward-weights and combined as --multi-objective-aggregation says. "
    "CME is logged beside each."
)


def parse_rewards(names: Sequence[str]) -> list[Reward]:
    """The rewards of `--reward`.

    Raises CMEError, which names the one that is unknown, has a wrong option, is given twice, or stands alone.
    """
    rewards = [_parse(text) for text in names]
    if not rewards:
        raise CMEError(f"--reward names no reward: give {', '.join(REWARDS)}")
    given = [reward.name for reward in rewards]
    twice = [name for name in REWARDS if given.count(name) > 1]
    if twice:
        raise CMEError(f"--reward names {twice[0]} twice: give it once, with its weight in --reward-weights")
    if DENSE in given and len(given) > 1:
        raise CMEError(f"--reward {' '.join(names)}: {DENSE} rewards tokens, not responses, and stands alone")
    return rewards


def _parse(text: str) -> Reward:
    name, _, option = text.partition(":")
    if name not in REWARDS:
        raise CMEError(
            f"--reward: {text!r} is not a reward; there are {', '.join(REWARDS)}. Give several one after another, "
            "their weights with --reward-weights, and options after a colon (cme-min:MODEL)"
        )
    try:
        return replace(REWARDS[name], option=REWARDS[name].read(option))
    except ValueError as error:
        raise CMEError(f"--reward {text}: {error}") from error
