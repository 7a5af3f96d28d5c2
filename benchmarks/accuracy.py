"""Errors of the token statistics against float64 at a real vocabulary: `python -m benchmarks.accuracy`.

The largest error of each statistic of `linear_logprob`, of float32 eager on the same inputs, and of logits rounded
to bfloat16 with everything after that exact; in nats, for logits of a given spread. Writes results/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import environment, results
from benchmarks.shapes import Inputs, Shape, make_inputs
from benchmarks.timing import DEVICE
from cme_kernels import TokenStats, linear_logprob, reference
from cme_kernels.stats import OPTIONAL_STATS, LogitTransform

OUTPUT = Path(__file__).parent / "results" / "accuracy.json"
STATS = tuple(name for name in TokenStats.names() if name != "argmax")


def eager(inputs: Inputs, dtype: torch.dtype) -> TokenStats:
    """Every operation in `dtype`."""
    hidden, weight, targets = inputs.hidden, inputs.weight, inputs.targets
    return reference.token_stats(hidden, weight, targets, None, LogitTransform(), OPTIONAL_STATS, dtype)


def rounded(inputs: Inputs) -> TokenStats:
    """Exact, from logits that a bfloat16 product has rounded."""
    logits = (inputs.hidden.float() @ inputs.weight.float().T).bfloat16()
    log_p = logits.double().log_softmax(-1)
    return TokenStats(log_p.gather(1, inputs.targets.unsqueeze(1)).squeeze(1))


def errors(stats: TokenStats, exact: TokenStats) -> dict[str, float]:
    """Largest absolute error of each statistic that is there."""
    values: dict[str, tuple[Tensor | None, Tensor | None]] = {
        name: (getattr(stats, name), getattr(exact, name)) for name in STATS
    }
    return {
        name: float((value.double() - truth).abs().max())
        for name, (value, truth) in values.items()
        if value is not None and truth is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--spread", type=float, default=20.0, help="standard deviation of the logits")
    args = parser.parse_args()
    shape = Shape("custom", args.tokens, args.hidden_size, args.vocab_size)
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':<32}" + "".join(f"{name:>18}" for name in STATS))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make_inputs(shape, dtype, DEVICE, 0, args.spread)
        exact = eager(inputs, torch.float64)
        ours = linear_logprob(inputs.hidden, inputs.weight, inputs.targets, stats=OPTIONAL_STATS)
        contestants = {
            "cme": ours,
            "float32 eager": eager(inputs, torch.float32),
            "bfloat16 logits": rounded(inputs),
        }
        name = str(dtype).removeprefix("torch.")
        found[name] = {contestant: errors(stats, exact) for contestant, stats in contestants.items()}
        for contestant, own in found[name].items():
            print(f"{name + ', ' + contestant:<32}" + "".join(f"{own.get(s, float('nan')):>18.1e}" for s in STATS))
    hardware = environment.hardware(DEVICE)
    document = {"hardware": hardware, "torch": torch.__version__, "shape": asdict(shape), "spread": args.spread}
    results.write(OUTPUT, json.dumps({**document, "largest_errors": found}, indent=1) + "\n")
    print(f"Written to {OUTPUT}")


if __name__ == "__main__":
    main()
