"""One cell of the results: one shape and one pass, all contestants taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import ceilings
from benchmarks.oracle import Oracle
from benchmarks.peers import FORWARD, FROZEN, MATMULS, LogProb, Peer
from benchmarks.shapes import Inputs, Shape
from benchmarks.timing import CUDA, describe, take_turns


def make_call(function: LogProb, inputs: Inputs, pass_name: str) -> Callable[[], Any]:
    """A contestant's pass over the inputs. The forward returns log-probabilities, the others gradients."""
    return partial(_forward if pass_name == FORWARD else _backward, function, inputs)


def _forward(function: LogProb, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return function(inputs.hidden, inputs.weight, inputs.targets)


def _backward(function: LogProb, inputs: Inputs) -> tuple[Tensor, ...]:
    logprob = function(inputs.hidden, inputs.weight, inputs.targets)
    upstream = inputs.upstream.to(logprob.dtype) if logprob.dim() else torch.ones_like(logprob)
    leaves = [x for x in (inputs.hidden, inputs.weight) if x.requires_grad]
    return torch.autograd.grad(logprob, leaves, upstream)


def require_gradients(inputs: Inputs, pass_name: str) -> None:
    inputs.hidden.requires_grad_(pass_name != FORWARD)
    inputs.weight.requires_grad_(pass_name not in (FORWARD, FROZEN))


def run_cell(
    shape: Shape,
    pass_name: str,
    inputs: Inputs,
    peers: Sequence[Peer],
    rounds: int,
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a cell. `progress` is told the contestant's name after each of its rounds + 1 calls.

    Returns:
        What results.json keeps of it; `contestants` maps each name to raw samples, or to why there are none.
    """
    require_gradients(inputs, pass_name)
    device, dtype = inputs.hidden.device, inputs.hidden.dtype
    obstacles = {peer.name: peer.obstacle(device, dtype, pass_name) for peer in peers}
    contestants: dict[str, dict[str, Any]] = {name: {"skipped": why} for name, why in obstacles.items() if why}
    calls: dict[str, Callable[[], Any]] = dict(ceilings.matmuls(inputs))
    peak = {name: shape.matmul_flop / ceilings.fastest(call) for name, call in calls.items()}
    for peer in peers:
        if not obstacles[peer.name]:
            calls[peer.name] = make_call(peer.function(), inputs, pass_name)

    oracle = Oracle(inputs, pass_name)
    per_token = {peer.name: peer.per_token for peer in peers}
    for name in list(calls):
        try:
            output = calls[name]()  # the warm-up, which compiles
            if name in per_token:
                contestants[name] = oracle.errors(output, per_token[name])
            del output
        except Exception as error:  # a peer may raise anything; the others run on
            del calls[name]
            contestants[name] = {"failed": describe(error)}
        progress(name)

    clocks: list[int] = []

    def after_call(name: str) -> None:
        clocks.extend(_clock())
        progress(name)

    samples, failures = take_turns(calls, rounds, seed=seed, after_call=after_call)
    for name, own in samples.items():
        contestants[name] = {**contestants.get(name, {}), "seconds": own.seconds, "extra_mib": own.extra_mib}
    peak = {name: max(own, shape.matmul_flop / min(samples[name].seconds)) for name, own in peak.items()}
    contestants |= {name: {"failed": message} for name, message in failures.items()}
    clock = {"median": statistics.median(clocks), "min": min(clocks)} if clocks else None
    return _cell(shape, pass_name, rounds, contestants, peak, clock)


def failed_cell(shape: Shape, pass_name: str, rounds: int, message: str) -> dict[str, Any]:
    """Record of a cell in which not even the matmul could run."""
    return _cell(shape, pass_name, rounds, {ceilings.ALLOCATING: {"failed": message}}, {}, None)


def _cell(
    shape: Shape,
    pass_name: str,
    rounds: int,
    contestants: dict[str, dict[str, Any]],
    peak: dict[str, float],
    clock: dict[str, float] | None,
) -> dict[str, Any]:
    return {
        "shape": vars(shape),
        "pass": pass_name,
        "rounds": rounds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "flop": shape.matmul_flop * MATMULS[pass_name],
        "matmul_peak_flop_per_second": peak,
        "gpu_clock_mhz": clock,
        "contestants": contestants,
    }


def _clock() -> list[int]:
    """The GPU's clock in MHz, in a list that is empty where nothing tells it."""
    if not CUDA:
        return []
    try:
        return [torch.cuda.clock_rate()]
    except Exception:  # pynvml is missing, or the driver does not tell: no reason to stop
        return []
