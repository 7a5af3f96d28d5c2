"""The self-check: a proof, for the model at hand, that packed scores are those of plain forward passes one by one.

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
"""Tokens that the long text is cut by: responses to one prompt that begin alike."""

CHUNK = 7
"""Tokens that feed-forward layers take per call during the check, so that its batches are cut."""

PROBE_LOGIT = 16.0
"""Largest logit in the check of the head: a cap at 30 changes it by more than a nat."""

_NOT_CAUSAL = "it is not a causal language model: its predictions change with the tokens that follow them"


def why_not_packed(model: PreTrainedModel, gradients: bool = False) -> str | None:
    """None if `model` can score packs, else the reason why it cannot. Runs a few short forward passes.

    With `gradients` the pack is scored once more, with gradients on, because attention may then be computed in
    another way. Raises UnsupportedModelError if the output layer is not one linear projection.
    """
    grad_modes = (False, True) if gradients else (False,)
    # Scoring is in inference mode; but what a model keeps from it, training could not use
    mode = torch.no_grad() if gradients else torch.inference_mode()
    with _short_windows(model), mode:
        return _first_reason(
            model,
            _other_layers,
            _head_difference,
            lambda model: _difference(model, pack, grad_modes),
            lambda model: _long_difference(model, pack, 0),
        )


def why_not_scored(model: PreTrainedModel) -> str | None:
    """None if right-padded batches have the scores of plain forward passes, else the reason why they do not."""
    with torch.inference_mode():
        return _first_reason(
            model,
            _why_not_causal,
            _head_difference,
            lambda model: _difference(model, pad),
            lambda model: _long_difference(model, pad, LONG),
        )


def _first_reason(model: PreTrainedModel, *checks: Callable[[PreTrainedModel], str | None]) -> str | None:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model, and a causal (decoder-only) language model is needed"
    try:
        with evaluating(model):
            return next((reason for check in checks if (reason := check(model)) is not None), None)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a foreign model does with inputs it was not written for
        return f"a forward pass failed: {type(error).__name__}: {error}"


def _other_layers(model: PreTrainedModel) -> str | None:
    # States of recurrent layers, and chunks of keys, would run on from one response of a pack into the next
    other = set(getattr(_text_config(model), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not other:
        return None
    return f"its layers include {', '.join(sorted(other))}, which would mix the responses of a pack"


def _requests(model: PreTrainedModel) -> list[Request]:
    # Responses of unequal length to three prompts. Two of these share their beginning and are longer than WINDOW,
    # so that a window that is off by one changes scores; one is a single token
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
        # As in scoring, where feed-forward layers take chunks, and as in training, where they do not
        chunks = contextlib.nullcontext() if grad_mode else in_chunks(model, CHUNK)
        with torch.set_grad_enabled(grad_mode), chunks:
            reason = _exceeds(model, _scores(model, batch), plain)
        if reason is not None:
            return f"with gradients on, {reason}" if grad_mode else reason
    return None


def _scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[N] log-probabilities of a batch, in the order of the requests that it was made from."""
    logprobs = score_batch(model, batch).logprob.detach().split(batch.lengths)
    parts = dict(zip(batch.members, logprobs, strict=True))
    return torch.cat([parts[i] for i in range(len(parts))])


def _one_by_one(model: PreTrainedModel, request: Request) -> Tensor:
    """[T] log-probabilities from the logits of one unpadded sequence, the definition everything else must meet."""
    ids = torch.tensor([[*request.prompt, *request.response]], device=input_device(model))  # [1, P + T]
    n = len(request.response)
    # The logits at one position predict the token at the next
    logprobs = _log_softmax(model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1])  # [T, V]
    return logprobs.gather(1, ids[0, -n:, None].to(logprobs.device)).squeeze(1)


def _why_not_causal(model: PreTrainedModel) -> str | None:
    """The reason if a token's prediction changes with the tokens that follow it."""
    ids = torch.tensor([_requests(model)[0].prompt], device=input_device(model))
    half = ids.shape[1] // 2
    other = torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)
    with _eager(model):
        one, two = (_log_softmax(model(input_ids=x, use_cache=False).logits[0, :half]) for x in (ids, other))
    # Broken weights are the other checks' finding
    if one.isfinite().all() and _exceeds(model, one, two) is not None:
        return _NOT_CAUSAL
    return None


def _long_difference(model: PreTrainedModel, make_batch: Callable[..., Batch], at_least: int) -> str | None:
    """The reason if a text beyond any limit of attention has other scores in a batch, or with a longer tail."""
    for length in _long_lengths(model, at_least):
        try:
            with _first_layers(model):
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
    with _eager(model):
        plain = [score_batch(model, _alone(model, request)).logprob for request in requests]
    # Equal beginnings have equal scores, unless a layer looks at what follows
    for shorter in plain[1:] if plain[0].isfinite().all() else ():
        if _exceeds(model, shorter, plain[0][: len(shorter)], HALF_LONG_TOLERANCE) is not None:
            return f"{_NOT_CAUSAL}, in a text of {length} tokens"
    together = _scores(model, make_batch(requests, input_device(model)))
    reason = _exceeds(model, together, torch.cat(plain), HALF_LONG_TOLERANCE)
    return reason and f"in a text of {length} tokens {reason}"


def _alone(model: PreTrainedModel, request: Request) -> Batch:
    """A plain forward pass, without the mask and positions of a padded batch."""
    batch = pad([request], input_device(model))
    return replace(batch, inputs={"input_ids": batch.inputs["input_ids"]})


def _long_lengths(model: PreTrainedModel, at_least: int) -> list[int]:
    """Lengths that exceed whatever may limit attention, the largest first. That may be any number in the
    configuration, because each family names its chunks, blocks and selections as it likes."""
    config = _text_config(model)
    # Numbers that Llama's configuration has too are sizes, and windows are cut instead
    known = {**vars(LlamaConfig()), "sliding_window": None, "original_max_position_embeddings": None}
    known |= {own: None for usual, own in config.attribute_map.items() if usual in known}
    context = min(getattr(config, name, None) or math.inf for name in _CONTEXTS)
    numbers = [n for name, value in vars(config).items() if name not in known for n in _whole_numbers(value)]
    short = len(_requests(model)[0])
    # Beyond the context there is nothing
    limits = [n + 8 * WINDOW for n in numbers if short < n <= LONGEST and n < context]
    lengths = {int(min(max(n, at_least), context)) for n in (*limits, at_least)}
    return sorted((n for n in lengths if n > short), reverse=True)


def _whole_numbers(value: object) -> list[int]:
    # Some settings have one number per layer, or per kind of layer
    value = list(value.values()) if isinstance(value, dict) else value
    values = value if isinstance(value, list | tuple) else [value]
    return [n for n in values if isinstance(n, int)]


def _first_layers(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Only the first layers, two or until there is one of each kind, so that a long text costs little."""
    layers = set(decoder_layers(model))
    stacks = [
        (owner, name, stack)
        for owner in backbone_of(model).modules()
        for name, stack in owner.named_children()
        if isinstance(stack, nn.ModuleList) and len(stack) > 0 and layers.issuperset(stack)
    ]
    if len(stacks) != 1:  # towers of other modalities, or layers of its own: all of them
        return contextlib.nullcontext()
    owner, name, stack = stacks[0]
    kinds = [_kind(model, layer, i) for i, layer in enumerate(stack)]
    return _replaced([owner], name, stack[: max(1, *map(kinds.index, kinds)) + 1])


def _kind(model: PreTrainedModel, layer: nn.Module, index: int) -> tuple[object, ...]:
    """Everything that tells one layer from another, apart from its weights and its index."""
    types = getattr(_text_config(model), "layer_types", None) or {}
    settings = [
        (name, type(module), key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | None) and value is not index
    ]
    return (types[index] if index < len(types) else None, *settings)


def _head_difference(model: PreTrainedModel) -> str | None:
    """The reason if `LMHead` and `model` give the same hidden states other scores. They are so large that caps and
    scales show."""
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
    # 16-bit weights round single tokens far off, so there it is the mean that must be right
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


def _short_windows(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Cut sliding windows to WINDOW tokens, in the configurations that masks follow and in the layers that hand
    their window to the attention function. A model that keeps its window elsewhere disagrees with itself in here,
    so it is padded."""
    config = _text_config(model)
    window = getattr(config, "sliding_window", None)
    # A window as long as the context never cuts anything off
    if window is None or not WINDOW < window < (getattr(config, "max_position_embeddings", None) or window + 1):
        return contextlib.nullcontext()
    owners = (owner for module in model.modules() for owner in (module, getattr(module, "config", None)))
    having = [owner for owner in owners if getattr(owner, "sliding_window", None) == window]
    return _replaced(having, "sliding_window", WINDOW)


@contextlib.contextmanager
def _replaced(owners: Sequence[Any], name: str, value: object) -> Iterator[None]:
    """The attribute `name` of all `owners` is `value`, and afterwards what it was."""
    before = [getattr(owner, name) for owner in owners]
    for owner in owners:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            setattr(owner, name, old)
