"""Rewards by name, as `cme.train --reward` takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cme.errors import CMEError
from cme.policy import Policy
from cme.reward import CMEReward
from cme.rewards.combined import Combined, Observed, Reward
from cme.rewards.policy import LogRatio, SelfCertainty, TokenEntropy
from cme.rewards.text import Length, MajorityVote
from cme.rewards.verifiers import Likelihood, VerifierEntropy, WithoutQuestion, random_verifier
from cme.verifier import Verifier


@dataclass(frozen=True)
class Parts:
    """What rewards are made of.

    Attributes:
        cme: with the verifier, and the prompts that it sees.
        policy: the model in training.
        load: a verifier by the name of its model.
    """

    cme: CMEReward
    policy: Policy
    load: Callable[[str], Verifier]

    def likelihood(self, verifier: Verifier, name: str = "likelihood", per_byte: bool = False) -> Likelihood:
        return Likelihood(verifier, self.cme.prompt_column, name, per_byte)


def _likelihood(parts: Parts, _: None) -> Reward:
    return parts.likelihood(parts.cme.verifier, "cme")


def _ensemble(combine: Callable[..., float], name: str, parts: Parts, models: list[str]) -> Reward:
    verifiers = [parts.cme.verifier, *(parts.load(model) for model in models)]
    return Combined([parts.likelihood(v, per_byte=True) for v in verifiers], combine, name)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


DENSE = "cme-dense"

_BUILDERS: dict[str, Callable[[Parts, Any], Reward]] = {
    "cme": _likelihood,
    DENSE: _likelihood,
    "length": lambda parts, _: Length(),
    "majority": lambda parts, _: MajorityVote(),
    "self-certainty": lambda parts, _: SelfCertainty(parts.policy),
    "entropy": lambda parts, _: TokenEntropy(parts.policy),
    "log-ratio": lambda parts, _: LogRatio(parts.cme.verifier, parts.policy, parts.cme.prompt_column),
    "verifier-entropy": lambda parts, _: VerifierEntropy(parts.cme.verifier, parts.cme.prompt_column),
    "pmi": lambda parts, weight: WithoutQuestion(parts.cme.verifier, parts.cme.prompt_column, weight),
    "random-verifier": lambda parts, seed: parts.likelihood(
        random_verifier(parts.cme.verifier, seed), "random_verifier"
    ),
    "cme-min": partial(_ensemble, min, "cme_min"),
    "cme-mean": partial(_ensemble, _mean, "cme_mean"),
}
"""A reward from its parts and its options, as `_OPTIONS` reads them."""


def _weight(text: str) -> float:
    weight = float(text or 1)
    if not math.isfinite(weight):
        raise ValueError("the weight must be a finite number")
    return weight


def _models(text: str) -> list[str]:
    models = [name.strip() for name in text.split(",") if name.strip()]
    if not models:
        raise ValueError("name at least one verifier beside --verifier")
    return models


def _none(text: str) -> None:
    if text:
        raise ValueError("it takes no options; the model is named by --verifier or --model_name_or_path")


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "pmi": _weight,
    "random-verifier": lambda seed: int(seed or 0),
    "cme-min": _models,
    "cme-mean": _models,
}
"""What follows a reward's name, for those that take anything."""

NEEDS_POLICY = ("self-certainty", "entropy", "log-ratio")
NEEDS_WHOLE_RESPONSE = (DENSE, "log-ratio")

HELP = (
    "What is rewarded: 'cme'; 'cme-dense' (each token's advantage has its own part of CME; not in sums); of the "
    "generator 'self-certainty', 'entropy' (less is better), 'length' (shorter is "
    "better), 'majority' (share of the group with the same short answer); of the verifier 'verifier-entropy' "
    "(less is better), 'log-ratio' (to the generator: reverse KL), 'pmi[:WEIGHT]' (likelihood minus that without "
    "the question), 'random-verifier[:SEED]' (untrained weights); of several verifiers 'cme-min:MODEL,...' and "
    "'cme-mean:MODEL,...' (each MODEL as with --verifier_template auto); or a weighted sum, such as "
    "'cme+0.5*length'. CME is logged beside each."
)

_TERM = re.compile(r"(?:(-?[\d.]+)\*)?([a-z][a-z-]*)(?::(.*))?")


@dataclass(frozen=True)
class Term:
    """A reward in a weighted sum."""

    weight: float
    name: str
    options: str


def parse_reward(text: str) -> list[Term]:
    """The terms of a weighted sum of rewards. Raises CMEError, which names what is not known, and what options are
    wrong."""
    terms = []
    for part in re.split(r"\+(?=(?:-?[\d.]+\*)?[a-z])", text.strip()):
        match = _TERM.fullmatch(part.strip())
        try:
            if match is None or match[2] not in _BUILDERS:
                raise ValueError
            terms.append(Term(float(match[1] or 1), match[2], match[3] or ""))
        except ValueError as error:
            raise CMEError(
                f"--reward {text!r}: {part!r} is not a reward; there are {', '.join(_BUILDERS)}, each with a "
                "weight before it (0.5*length) or options after it (cme-min:MODEL)"
            ) from error
        _options(terms[-1])
    if any(term.name == DENSE for term in terms) and terms != [Term(1.0, DENSE, "")]:
        raise CMEError(f"--reward {text!r}: {DENSE!r} has rewards of tokens and stands alone, without a weight")
    return terms


def is_dense(text: str) -> bool:
    """Whether `--reward` asks for rewards of tokens, which is `DenseCMEReward` in the place of CMEReward."""
    return parse_reward(text) == [Term(1.0, DENSE, "")]


def build_reward(text: str, parts: Parts) -> Any:
    """The reward that `--reward` names, with what CMEReward logs beside it. Raises CMEError."""
    terms = parse_reward(text)
    if terms == [Term(1.0, "cme", "")] or is_dense(text):
        return parts.cme
    rewards = [_build(term, parts) for term in terms]
    if len(terms) == 1 and terms[0].weight == 1:
        return Observed(rewards[0], parts.cme)
    weights = [term.weight for term in terms]
    mixture = Combined(rewards, lambda row: sum(w * v for w, v in zip(weights, row, strict=True)), "mixture")
    return Observed(mixture, parts.cme)


def _build(term: Term, parts: Parts) -> Reward:
    return _BUILDERS[term.name](parts, _options(term))


def _options(term: Term) -> Any:
    try:
        return _OPTIONS.get(term.name, _none)(term.options)
    except ValueError as error:
        raise CMEError(f"--reward {term.name}:{term.options}: {error}") from error
