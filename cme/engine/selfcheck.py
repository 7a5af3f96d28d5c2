"""Proof, for the model at hand, that packed scores are the scores of plain one-by-one forward passes.

Short sequences prove what they can reach: masks, positions, sliding windows (cut to a few tokens for the check),
and everything between hidden states and log-probabilities. A text that is longer than what may limit attention in
the configuration, up to LONGEST, proves that choosing keys, blocks and chunks keep predictions what they are; few
layers suffice for it. RoPE frequencies that change with the length of the text are out of their reach;
`cme.engine.rope` keeps those apart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from cme.engine.feed_forward import decoder_layers, in_chunks
from cme.engine.forward import score_batch
from cme.engine.lm_head import LMHead, UnsupportedModelError, backbone_of, hidden_states_replaced, input_device
from cme.engine.packing import Batch, Request, pack, pad

TOLERANCE = 1e-3
"""Largest difference of one token's log-probability, in nats: far above the rounding of correct models in float32,
and far below what a wrong mask, position or logit scale does."""

HALF_TOLERANCE = 0.4
"""Limit of the differences' root mean square with 16-bit weights. On gemma-3-270m rounding alone gives 0.2, with
single tokens off by 0.5, and a window that is one token too long gives 1.4. Mixtures of experts may route a token
elsewhere."""

HALF_HEAD_TOLERANCE = 0.06
"""The same in the check of the head, where only logits are rounded: that gives up to 0.03, and a cap at 50 that is
overlooked 0.1 and more."""

HALF_LONG_TOLERANCE = 1.0
"""The same for the long text, whose words are few: experts that rounding exchanges in one place, it exchanges in
many. A tiny Mixtral gives 0.44."""

WINDOW = 8
"""Sliding windows are cut to this many tokens during the check, so that its prompts are longer than they are."""

LONGEST = 2048
"""Numbers in the configuration up to here may limit attention, and the long text of the check exceeds them."""

LONG = 128
"""Tokens that the long text has at least, where layers are of a model's own: some chunk by 64 whatever it says."""

_CONTEXTS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_target_positions",
    "n_positions",
    "n_ctx",
    "seq_length",
)
"""Names that families in transformers have for the most tokens of a text."""

_CUTS = (0, 1, WINDOW, 3 * WINDOW + 1)
"""Tokens that the long text is cut by."""

CHUNK = 7
"""Feed-forward layers take this many tokens at a time during the check, so that its batches are cut."""

PROBE_LOGIT = 16.0
"""Largest logit in the check of the head: a cap at 30 changes it by more than a nat."""

ENCODER_DECODER = "it is an encoder-decoder model, and a causal (decoder-only) language model is needed"
_NOT_CAUSAL = "it is not a causal language model: its predictions change with the tokens that follow them"
FULL_OR_SLIDING = {"full_attention", "sliding_attention"}


def why_not_packed(model: PreTrainedModel, gradients: bool = False) -> str | None:
    """None if `model` can score packs, else the reason it can't. Runs a few short forward passes.

    With `gradients` the pack is scored once more, with gradients on, because attention may then be computed in
    another way.

    Raises UnsupportedModelError if its output layer is not one linear projection.
    """
    if model.config.is_encoder_decoder:
        return ENCODER_DECODER
    other = set(getattr(_text_config(model), "layer_types", None) or ()) - FULL_OR_SLIDING
    if other:
        return f"its layers include {', '.join(sorted(other))}, which would mix the responses of a pack"
    grad_modes = (False, True) if gradients else (False,)
    # Scoring is in inference mode; but what a model keeps from it, training could not use
    mode = torch.no_grad() if gradients else torch.inference_mode()
    with _short_windows(model), mode:
        return _first_reason(
            model,
            _head_difference,
            lambda model: _difference(model, pack, grad_modes),
            lambda model: _long_difference(model, pack, 0),
        )


def why_not_scored(model: PreTrainedModel) -> str | None:
    """None if right-padded batches have the scores of plain forward passes too, else the reason they don't."""
    if model.config.is_encoder_decoder:
        return ENCODER_DECODER
    with torch.inference_mode():
        return _first_reason(
            model,
            _why_not_causal,
            _head_difference,
            lambda model: _difference(model, pad),
            lambda model: _long_difference(model, pad, LONG),
        )


def _first_reason(model: PreTrainedModel, *checks: Callable[[PreTrainedModel], str | None]) -> str | None:
    try:
        with evaluating(model):
            return next((reason for check in checks if (reason := check(model)) is not None), None)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a foreign model does with inputs it was not written for
        return f"a forward pass failed: {type(error).__name__}: {error}"


def _requests(model: PreTrainedModel) -> list[Request]:
    # Responses of unequal length to three prompts; two of these share their beginning, one has a single token
    vocab_size: int = _text_config(model).vocab_size
    # Low ids are special tokens in most vocabularies, and high ones padding
    low, high = vocab_size // 10, max(vocab_size * 9 // 10, vocab_size // 10 + 1)
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(low, high, (n,), generator=generator).tolist())

    shared = tokens(2 * WINDOW)
    prompts = [(*shared, *tokens(WINDOW)), (*shared, *tokens(3)), tokens(1)]
    return [Request(prompt, tokens(n)) for prompt in prompts for n in (6, 3)]


def _difference(
    model: PreTrainedModel, make_batch: Callable[..., Batch], grad_modes: Sequence[bool] = (False,)
) -> str | None:
    requests = _requests(model)
    with _eager(model):
        plain = torch.cat([_one_by_one(model, request) for request in requests])
    batch = make_batch(requests, input_device(model))
    for grad_mode in grad_modes:
        chunks = contextlib.nullcontext() if grad_mode else in_chunks(model, CHUNK)
        with torch.set_grad_enabled(grad_mode), chunks:
            logprobs = score_batch(model, batch).logprob.detach().split(batch.lengths)
        parts = dict(zip(batch.members, logprobs, strict=True))
        reason = _exceeds(model, torch.cat([parts[i] for i in range(len(requests))]), plain)
        if reason is not None:
            return f"with gradients on, {reason}" if grad_mode else reason
    return None


def _one_by_one(model: PreTrainedModel, request: Request) -> Tensor:
    """[T] log-probabilities from the logits of one unpadded sequence, the definition everything else must meet."""
    ids = torch.tensor([[*request.prompt, *request.response]], device=input_device(model))
    n = len(request.response)
    logprobs = _log_softmax(model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1])
    return logprobs.gather(1, ids[0, -n:, None].to(logprobs.device)).squeeze(1)


def _why_not_causal(model: PreTrainedModel) -> str | None:
    """The reason if a token's prediction changes with the tokens that follow it."""
    ids = torch.tensor([_requests(model)[0].prompt], device=input_device(model))
    half = ids.shape[1] // 2
    other = torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)
    with _eager(model):
        one, two = (_log_softmax(model(input_ids=x, use_cache=False).logits[0, :half]) for x in (ids, other))
    if one.isfinite().all() and _exceeds(model, one, two) is not None:
        return _NOT_CAUSAL
    return None


def _long_difference(model: PreTrainedModel, make_batch: Callable[..., Batch], at_least: int) -> str | None:
    """The reason if a text beyond any limit of attention has other scores in a batch, or with a longer tail."""
    for length in _long_lengths(model, at_least):
        try:
            return _difference_at(model, make_batch, length)
        except UnsupportedModelError:
            raise
        except Exception:  # beyond its context or memory: so long a response would fail aloud too
            continue
    return None


def _difference_at(model: PreTrainedModel, make_batch: Callable[..., Batch], length: int) -> str | None:
    words = _requests(model)[0].prompt[:WINDOW]  # repeated, because equal words are equally good keys
    index = torch.randint(len(words), (length,), generator=torch.Generator().manual_seed(0)).tolist()
    start = length - 6 * WINDOW
    prompt, response = (tuple(words[i] for i in part) for part in (index[:start], index[start:]))
    requests = [Request(prompt, response[: len(response) - cut]) for cut in _CUTS]
    with _first_layers(model):
        with _eager(model):
            plain = [score_batch(model, _alone(model, request)).logprob for request in requests]
        for shorter in plain[1:] if plain[0].isfinite().all() else ():
            if _exceeds(model, shorter, plain[0][: len(shorter)], HALF_LONG_TOLERANCE) is not None:
                return f"{_NOT_CAUSAL}, in a text of {length} tokens"
        batch = make_batch(requests, input_device(model))
        parts = dict(zip(batch.members, score_batch(model, batch).logprob.split(batch.lengths), strict=True))
    together = torch.cat([parts[i] for i in range(len(requests))])
    reason = _exceeds(model, together, torch.cat(plain), HALF_LONG_TOLERANCE)
    return reason and f"in a text of {length} tokens {reason}"


def _alone(model: PreTrainedModel, request: Request) -> Batch:
    """A plain forward pass."""
    batch = pad([request], input_device(model))
    return replace(batch, inputs={"input_ids": batch.inputs["input_ids"]})


def _long_lengths(model: PreTrainedModel, at_least: int) -> list[int]:
    """Tokens that exceed whatever may limit attention, the most first. Numbers that Llama's configuration has too
    are sizes, windows are cut instead, and beyond the context there is nothing."""
    config = _text_config(model)
    known = {**vars(LlamaConfig()), "sliding_window": None, "original_max_position_embeddings": None}
    known |= {own: None for usual, own in config.attribute_map.items() if usual in known}
    context = min(getattr(config, name, None) or math.inf for name in _CONTEXTS)
    numbers = [n for name, value in vars(config).items() if name not in known for n in _whole_numbers(value)]
    short = len(_requests(model)[0])
    limits = [n + 8 * WINDOW for n in numbers if short < n <= LONGEST and n < context]
    lengths = {int(min(max(n, at_least), context)) for n in (*limits, at_least)}
    return sorted((n for n in lengths if n > short), reverse=True)


def _whole_numbers(value: object) -> list[int]:
    if isinstance(value, dict):
        value = list(value.values())
    values = value if isinstance(value, list | tuple) else [value]
    return [n for n in values if isinstance(n, int)]


@contextlib.contextmanager
def _first_layers(model: PreTrainedModel) -> Iterator[None]:
    """Only the first layers, two or until there is one of each kind, so that a long text costs little."""
    layers = set(decoder_layers(model))
    stacks = [
        (owner, name, stack)
        for owner in backbone_of(model).modules()
        for name, stack in owner.named_children()
        if isinstance(stack, nn.ModuleList) and len(stack) > 0 and layers.issuperset(stack)
    ]
    if len(stacks) != 1:  # towers of other modalities, or layers of its own: all of them
        yield
        return
    owner, name, stack = stacks[0]
    kinds = [_kind(model, layer, i) for i, layer in enumerate(stack)]
    setattr(owner, name, stack[: max(1, *map(kinds.index, kinds)) + 1])
    try:
        yield
    finally:
        setattr(owner, name, stack)


def _kind(model: PreTrainedModel, layer: nn.Module, index: int) -> tuple[object, ...]:
    """What tells one layer from another, its weights apart."""
    types = getattr(_text_config(model), "layer_types", None) or {}
    settings = [
        (name, type(module), key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | None) and value is not index
    ]
    return (types[index] if index < len(types) else None, *settings)


def _head_difference(model: PreTrainedModel) -> str | None:
    """Compare `LMHead` with what `model` makes of the same hidden states, so large that caps and scales show."""
    head = LMHead.of(model)
    targets = torch.tensor(_requests(model)[0].prompt, device=input_device(model))
    with align_module_device(head.projection):  # brings the weight back if it is offloaded
        weight = head.projection.weight
        probe = torch.randn(len(targets), weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        probe *= PROBE_LOGIT / F.linear(probe, weight).abs().max()

    with _eager(model), hidden_states_replaced(model, probe):
        logprobs = _log_softmax(model(input_ids=targets[None], use_cache=False).logits[0])
    plain = logprobs.gather(1, targets[:, None].to(logprobs.device)).squeeze(1)
    difference = _exceeds(model, head.token_stats(probe, targets).logprob, plain, HALF_HEAD_TOLERANCE)
    return difference and f"its final layers do more than one linear projection: {difference}"


def _exceeds(
    model: PreTrainedModel, scored: Tensor, plain: Tensor, half_tolerance: float = HALF_TOLERANCE
) -> str | None:
    if not plain.isfinite().all():
        return "its plain forward pass has NaN or infinite log-probabilities: its weights are broken"
    difference = (scored - plain).abs()
    if model.dtype.itemsize >= 4:
        error, tolerance, how = float(difference.max()), TOLERANCE, "at most"
    else:
        error, tolerance, how = float(difference.square().mean().sqrt()), half_tolerance, "in root mean square"
    if error <= tolerance:  # NaN is not
        return None
    return (
        f"a token's log-probability differs from the plain forward pass by {error:.3g} nats {how} "
        f"(limit {tolerance:g})"
    )


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, without dropout; afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """The model's own code, neither compiled nor with another attention function."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.set_attn_implementation(implementation)


@contextlib.contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Cut sliding windows to WINDOW tokens, in the configurations that masks follow and in the layers that hand
    their window to the attention function. A model that keeps its window elsewhere disagrees with itself in here,
    so it is padded."""
    config = _text_config(model)
    window = getattr(config, "sliding_window", None)
    # A window as long as the context never cuts anything off
    if window is None or not WINDOW < window < (getattr(config, "max_position_embeddings", None) or window + 1):
        yield
        return
    owners: list[Any] = [o for m in model.modules() for o in (m, getattr(m, "config", None))]
    cut = [o for o in owners if getattr(o, "sliding_window", None) == window]
    for owner in cut:
        owner.sliding_window = WINDOW
    try:
        yield
    finally:
        for owner in cut:
            owner.sliding_window = window
