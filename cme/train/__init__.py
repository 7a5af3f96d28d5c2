"""GRPO on the Cross-Model Entropy reward: `python -m cme.train`."""
