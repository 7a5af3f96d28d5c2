"""Rewards to train on beside Cross-Model Entropy: `names` lists them, `build` makes TRL's functions of them."""
