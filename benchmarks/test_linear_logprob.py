"""linear_logprob and its peers under pytest-benchmark, one group of contestants per shape and pass.

    pytest benchmarks/test_linear_logprob.py --benchmark-columns=median,iqr,rounds

For a quick look and for --benchmark-json or --benchmark-compare over time. `python -m benchmarks` has the same
contestants take turns, and measures ceilings, memory and errors too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.oracle import Oracle
from benchmarks.peers import BACKWARD, FORWARD, Peer, parse_peers
from benchmarks.runner import make_call, require_gradients
from benchmarks.shapes import SMALL, Shape, make_inputs, parse_shapes
from benchmarks.timing import CUDA, DEVICE

DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPES = parse_shapes(list(SMALL), None, DEVICE) if CUDA else parse_shapes(["SmolLM2-135M"], [128], DEVICE)
SPREAD = 3.0


@pytest.mark.parametrize("peer", parse_peers(None, DEVICE), ids=lambda peer: peer.name)
@pytest.mark.parametrize("pass_name", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pass(benchmark: Any, shape: Shape, pass_name: str, peer: Peer) -> None:
    obstacle = peer.obstacle(DEVICE, DTYPE, pass_name)
    if obstacle:
        pytest.skip(obstacle)
    inputs = make_inputs(shape, DTYPE, DEVICE, 0, SPREAD)
    require_gradients(inputs, pass_name)
    call = make_call(peer.function(), inputs, pass_name)

    def synchronized() -> Any:
        result = call()
        if CUDA:
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{shape}, {pass_name}, {DTYPE}"
    benchmark.pedantic(synchronized, rounds=20 if CUDA else 3, warmup_rounds=1)
    benchmark.extra_info.update(Oracle(inputs, pass_name).errors(call(), peer.per_token))
