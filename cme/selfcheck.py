"""Proof, for the model at hand, that packed scores are the scores of plain one-by-one forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cme.lm_head import UnsupportedModelError, input_device, score_batch
from cme.packing import Request, pack, pad

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 0.3
"""Largest difference of one token's log-probability, in nats: several times the rounding of correct models, and
far below what a wrong mask, position or logit scale does."""

LONGEST_WINDOW = 1024
"""Sliding windows up to this length are checked with a prompt that is longer than the window."""

FULL_OR_SLIDING = {"full_attention", "sliding_attention"}


def why_not_packed(model: PreTrainedModel) -> str | None:
    """None if `model` can score packs, else the reason it can't. Runs a few short forward passes."""
    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - FULL_OR_SLIDING
    if other:
        return f"its layers include {', '.join(sorted(other))}, which would mix the responses of a pack"
    requests = _requests(config)
    device = input_device(model)
    try:
        packed = _logprobs(model, pack(requests, device), len(requests))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a foreign model does with inputs it was not written for
        return f"a packed forward pass failed: {type(error).__name__}: {error}"
    return _difference(model, packed, requests)


def why_not_scored(model: PreTrainedModel) -> str | None:
    """None if the padded fallback, backbone and `linear_logprob`, reproduces the model's own logits."""
    requests = _requests(model.config.get_text_config())
    return _difference(model, _logprobs(model, pad(requests, input_device(model)), len(requests)), requests)


def _requests(config: object) -> list[Request]:
    # Two groups that share a prompt within and not across, responses of unequal length, fixed ids
    window = getattr(config, "sliding_window", None) or 0
    limit = getattr(config, "max_position_embeddings", None) or 4096
    long = window + 8 if window <= LONGEST_WINDOW else 24
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        # Low ids are special tokens in most vocabularies, and high ones padding
        vocab_size: int = config.vocab_size  # type: ignore[attr-defined]
        low, high = vocab_size // 10, max(vocab_size * 9 // 10, vocab_size // 10 + 1)
        return tuple(torch.randint(low, high, (n,), generator=generator).tolist())

    prompts = [tokens(max(2, min(long, limit - 8))), tokens(5)]
    return [Request(prompt, tokens(n)) for prompt in prompts for n in (5, 2, 4)]


def _logprobs(model: PreTrainedModel, batch: object, n: int) -> list[Tensor]:
    with _evaluating(model):
        values = score_batch(model, batch).logprob  # type: ignore[arg-type]
    parts = dict(zip(batch.members, values.split(batch.lengths), strict=True))  # type: ignore[attr-defined]
    return [parts[i] for i in range(n)]


def _difference(model: PreTrainedModel, scored: list[Tensor], requests: list[Request]) -> str | None:
    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    with _evaluating(model), _eager(model):
        plain = [_one_by_one(model, request) for request in requests]
    worst = max(float((a - b).abs().max()) for a, b in zip(scored, plain, strict=True))
    if worst <= tolerance:  # NaN is not
        return None
    return f"a token's log-probability differs from the plain forward pass by {worst:.3g} (limit {tolerance:g})"


def _one_by_one(model: PreTrainedModel, request: Request) -> Tensor:
    """[T] log-probabilities from the logits of one unpadded sequence, the definition everything else must meet."""
    ids = torch.tensor([[*request.prompt, *request.response]], device=input_device(model))
    n = len(request.response)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=n + 1).logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, ids[0, -n:, None].to(logits.device)).squeeze(1)


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
