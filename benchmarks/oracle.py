"""Errors of what contestants return, against float64 on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import FORWARD
from benchmarks.shapes import Inputs

ROWS = 64
COLUMNS = 16384
"""Rows and columns of the float64 logits that exist at a time."""


class Oracle:
    """Judges the results of one pass over some inputs, on ROWS rows spread over the batch.

    Log-probabilities by the largest and the rms error in nats; gradients by the norm of the error over the norm of
    the exact: that of hidden at these rows, that of the weight at the vocabulary entries which are their targets.
    """

    def __init__(self, inputs: Inputs, pass_name: str) -> None:
        self.hidden = inputs.hidden.detach().double()
        self.weight = inputs.weight.detach()
        self.targets, self.upstream, self.pass_name = inputs.targets, inputs.upstream, pass_name
        n = len(self.hidden)
        self.rows = torch.arange(0, n, max(1, n // ROWS), device=self.hidden.device)[:ROWS]
        self.gradients = cache(self._gradients)
        if pass_name == FORWARD:
            self.logprob = self._logprob()

    def errors(self, output: Any, per_token: bool) -> dict[str, float]:
        """Errors of log-probabilities [N] in the forward; else of gradients, with `per_token` those of the inputs'
        upstream gradient, without it those of the sum."""
        if self.pass_name == FORWARD:
            difference = output[self.rows].double() - self.logprob
            return {
                "max_error": difference.abs().max().item(),
                "rms_error": difference.square().mean().sqrt().item(),
            }
        entries = (self.rows, self.targets[self.rows])
        return {
            name: (((actual[entry].double() - exact).norm()) / exact.norm()).item()
            for name, actual, entry, exact in zip(
                ("hidden_gradient_error", "weight_gradient_error"),
                output,  # with a frozen head there is only the first
                entries,
                self.gradients(per_token),
                strict=False,
            )
        }

    def _chunks(self) -> Iterator[Tensor]:
        return (chunk.double() for chunk in self.weight.split(COLUMNS))

    def _logprob(self) -> Tensor:
        z = torch.cat([self.hidden[self.rows] @ chunk.T for chunk in self._chunks()], 1)  # [ROWS, V]
        return z.log_softmax(-1).gather(1, self.targets[self.rows].unsqueeze(1)).squeeze(1)

    def _gradients(self, per_token: bool) -> tuple[Tensor, Tensor]:
        """d sum_i g_i logprob_i: of hidden [ROWS, H], and of the weight [ROWS, H]."""
        hidden, rows = self.hidden, self.rows
        g = self.upstream.double() if per_token else torch.ones_like(self.upstream, dtype=torch.float64)
        lse = torch.full_like(g, -torch.inf)
        for chunk in self._chunks():
            lse = torch.logaddexp(lse, (hidden @ chunk.T).logsumexp(1))

        # d logprob_i / d hidden_i = weight_t - sum_j p_ij weight_j
        of_hidden = self.weight[self.targets[rows]].double()
        for chunk in self._chunks():
            of_hidden -= (hidden[rows] @ chunk.T - lse[rows].unsqueeze(1)).exp() @ chunk
        of_hidden *= g[rows].unsqueeze(1)

        # d logprob_i / d weight_j = (1[j = t] - p_ij) hidden_i
        columns = self.targets[rows]
        p = (hidden @ self.weight[columns].double().T - lse.unsqueeze(1)).exp()  # [N, ROWS]
        hit = (self.targets.unsqueeze(1) == columns).double()
        return of_hidden, ((hit - p) * g.unsqueeze(1)).T @ hidden
