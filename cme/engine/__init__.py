"""Requests of token ids -> statistics of their response tokens, in packed forward passes without logits."""
