"""Evaluation of verifiers, and of models before and after training."""
