"""Scoring a group of responses: each prompt once, against padded batches of whole sequences.

    pytest benchmarks/test_scoring.py -m real_models -s

The gain depends on the shape: with long prompts and short responses most of a padded batch is copies of the
prompt, and with the opposite almost nothing is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.timing import DEVICE, race, report
from cme.attention import IMPLEMENTATION
from cme.demo.models import local_path
from cme.packing import Request
from cme.scoring import score_requests

MODEL, DTYPE = "smollm2-135m-instruct", torch.float32
GROUP = 8
SHAPES = {"prompt 256, responses 64": (256, 64), "prompt 32, responses 96": (32, 96)}
ROUNDS = 3

pytestmark = pytest.mark.real_models


def load(attention: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        local_path(MODEL), dtype=DTYPE, attn_implementation=attention, device_map=DEVICE
    )
    return model.eval().requires_grad_(False)


def all_logprobs(model: PreTrainedModel, ids: Tensor, length: int) -> Tensor:
    """[G, T]: the log-softmax of the logits of every position, of which the responses' are kept."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return target_logprobs(logits, ids[:, 1:])[:, -length:]


def all_logits(model: PreTrainedModel, ids: Tensor, length: int) -> Tensor:
    """The logits of every position, but the log-softmax only of those that predict a response token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, -length - 1 : -1]
    return target_logprobs(logits, ids[:, -length:])


def logits_to_keep(model: PreTrainedModel, ids: Tensor, length: int) -> Tensor:
    """Logits of the last positions only, which are the responses' here, where all end together."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    return target_logprobs(logits, ids[:, -length:])


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


PADDED = {"all log-softmax": all_logprobs, "all logits": all_logits, "logits_to_keep": logits_to_keep}


def packed(model: PreTrainedModel, requests: list[Request]) -> Tensor:
    scores = score_requests(model, requests, max_batch_tokens=8192)
    return torch.stack([tokens.logprob for tokens in scores])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_group(benchmark: Any, shape: tuple[int, int]) -> None:
    prompt, length = shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (GROUP, prompt + length), generator=generator)
    ids[:, :prompt] = ids[0, :prompt]
    requests = [Request(tuple(row[:prompt]), tuple(row[prompt:])) for row in ids.tolist()]
    plain, ours = load("sdpa"), load(IMPLEMENTATION)
    calls: dict[str, Callable[[], Tensor]] = {
        name: partial(function, plain, ids.to(DEVICE), length) for name, function in PADDED.items()
    }
    calls["cme"] = partial(packed, ours, requests)
    with torch.inference_mode():
        values = {name: call().cpu() for name, call in calls.items()}
        results = race(calls, "cme", ROUNDS)
        benchmark.pedantic(calls["cme"], rounds=1)
    exact = values["all log-softmax"]
    errors = {name: (value - exact).abs().max().item() for name, value in values.items()}
    report(
        "scoring a group", "cme", results, errors, benchmark,
        model=MODEL, dtype=str(DTYPE), group=GROUP, prompt=prompt, response=length,
    )  # fmt: skip
    assert exact.std() > 1
    assert errors["cme"] <= 1e-3
