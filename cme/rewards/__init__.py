"""Rewards to compare Cross-Model Entropy with, as reward functions for TRL."""

from cme.policy import Policy
from cme.rewards.combined import Combined, Observed
from cme.rewards.dense import DenseCMEReward
from cme.rewards.policy import LogRatio, SelfCertainty, TokenEntropy
from cme.rewards.text import Length, MajorityVote
from cme.rewards.verifiers import Likelihood, VerifierEntropy, WithoutQuestion, random_verifier

__all__ = [
    "Combined",
    "DenseCMEReward",
    "Length",
    "Likelihood",
    "LogRatio",
    "MajorityVote",
    "Observed",
    "Policy",
    "SelfCertainty",
    "TokenEntropy",
    "VerifierEntropy",
    "WithoutQuestion",
    "random_verifier",
]
