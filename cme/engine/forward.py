"""The forward loop: requests -> packs that fit in memory -> hidden states of response tokens -> results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cme.engine.feed_forward import in_chunks
from cme.engine.heap import keep_freed_memory, release, trim
from cme.engine.lm_head import LMHead, backbone_of, input_device, num_ids
from cme.engine.memory import FEWEST_TOKENS, token_budget
from cme.engine.packing import Batch, Request, make_batches
from cme.engine.rope import same_frequencies
from cme.errors import is_out_of_memory
from cme_kernels import TokenStats

Result = TypeVar("Result")


def hidden_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """One forward pass over `batch`: the [N, H] hidden states that predict its N response tokens."""
    hidden = backbone_of(model)(**batch.inputs, use_cache=False).last_hidden_state  # [B, L, H]
    return hidden.flatten(0, 1).index_select(0, batch.rows.to(hidden.device))


def score_batch(
    model: PreTrainedModel, batch: Batch, stats: Sequence[str] = (), temperature: float = 1.0
) -> TokenStats:
    """One forward pass over `batch`: statistics of its N response tokens, in the order of `batch.members`."""
    return LMHead.of(model).token_stats(hidden_rows(model, batch), batch.targets, stats, temperature)


def score_requests(
    model: PreTrainedModel,
    requests: Sequence[Request],
    stats: Sequence[str] = (),
    *,
    max_batch_tokens: int | Literal["auto"] = "auto",
    packed: bool = True,
    on_scored: Callable[[int], object] = lambda count: None,
) -> list[TokenStats | str]:
    """Statistics of each request's response tokens, on the CPU. Arguments and errors as of `compute_requests`."""

    @torch.inference_mode()
    def compute(batch: Batch) -> list[TokenStats]:
        return _split(score_batch(model, batch, stats), batch)

    return compute_requests(
        model, requests, compute, max_batch_tokens=max_batch_tokens, packed=packed, on_scored=on_scored
    )


def compute_requests(
    model: PreTrainedModel,
    requests: Sequence[Request],
    compute: Callable[[Batch], Sequence[Result]],
    *,
    max_batch_tokens: int | Literal["auto"] = "auto",
    packed: bool = True,
    on_scored: Callable[[int], object] = lambda count: None,
) -> list[Result | str]:
    """The results of `compute` in the order of `requests`. Equal requests are computed once.

    In the place of a request that cannot be scored is the reason: a token that the model does not know, or more
    tokens than there is memory for.

    Args:
        compute: one forward pass of `model`, without gradients: a result on the CPU for each of `batch.members`.
        max_batch_tokens: most tokens in one forward pass; "auto" is `cme.engine.memory.token_budget`. Where memory
            runs out, half as many are tried, down to one request at a time.
        on_scored: called after each batch with the number of requests in it.

    Raises:
        ValueError: a budget that is not positive.
        MemoryError: there is none left even for a request no longer than others that were scored.
    """
    if max_batch_tokens != "auto" and max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens must be positive or 'auto', not {max_batch_tokens}")
    copies = Counter(requests)  # in the order of their first occurrence
    results: dict[Request, Result | str] = dict(_with_unknown_tokens(copies, num_ids(model)))
    on_scored(sum(copies[request] for request in results))
    budget = token_budget(model) if max_batch_tokens == "auto" else max_batch_tokens
    with torch.no_grad(), keep_freed_memory(), in_chunks(model):
        for part in same_frequencies(model.config, [request for request in copies if request not in results]):
            for scored in _compute_part(part, compute, budget, input_device(model), packed):
                results.update(scored)
                trim()  # else the results pin the memory of the pass around them
                on_scored(sum(copies[request] for request in scored))
    return [results[request] for request in requests]


def _compute_part(
    requests: Sequence[Request],
    compute: Callable[[Batch], Sequence[Result]],
    budget: int,
    device: torch.device,
    packed: bool,
) -> Iterator[dict[Request, Result | str]]:
    """The results of requests that may share a batch, batch by batch. Where memory runs out, the rest continues
    with half the budget."""
    left = dict.fromkeys(requests)  # a set that keeps its order
    fitted = FEWEST_TOKENS  # most tokens of which a pass is sure not to be what memory is too small for
    while left:
        waiting = list(left)
        for batch in make_batches(waiting, budget, device, packed):
            members = [waiting[i] for i in batch.members]
            scored: Sequence[Result | str] | None = _computed_if_memory_lasts(compute, batch)
            tokens = batch.inputs["input_ids"].numel()  # padding included
            if scored is not None:
                fitted = max(fitted, tokens)
            else:
                release(device)
                if len(members) > 1:  # pack all that is left anew, for a smaller budget
                    budget = min(budget, tokens) // 2
                    break
                if tokens <= fitted:
                    # As many tokens went through before, so the request is not to blame, and others would fail too
                    raise MemoryError(
                        f"out of memory in a forward pass over {tokens} tokens: something else took it"
                    )
                scored = [_out_of_memory(tokens)]
            for request in members:
                del left[request]
            yield dict(zip(members, scored, strict=True))


def _computed_if_memory_lasts(
    compute: Callable[[Batch], Sequence[Result]], batch: Batch
) -> Sequence[Result] | None:
    # The error holds the tensors of the failed pass, so it must be gone before the next is tried
    try:
        return compute(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _out_of_memory(tokens: int) -> str:
    return (
        f"out of memory in a forward pass over this response alone, {tokens} tokens with its prompt: shorten it, "
        "load the model in bfloat16, or free memory"
    )


def _split(stats: TokenStats, batch: Batch) -> list[TokenStats]:
    # [N] per statistic -> one TokenStats [T_i] per request; one copy to the CPU per statistic
    columns = {
        name: value.cpu().split(batch.lengths)
        for name in TokenStats.names()
        if (value := getattr(stats, name)) is not None
    }
    return [TokenStats(**{n: parts[k] for n, parts in columns.items()}) for k in range(len(batch.members))]


def _with_unknown_tokens(requests: Iterable[Request], num_ids: int) -> dict[Request, str]:
    # Tokenizers may know added tokens, of images say, for which a text model has no row: on a GPU that would be an
    # assertion on the device, which ends the process
    reasons: dict[Request, str] = {}
    for request in requests:
        lowest, highest = (f(f(request.prompt), f(request.response)) for f in (min, max))
        if lowest < 0 or highest >= num_ids:
            unknown = lowest if lowest < 0 else highest
            reasons[request] = f"the verifier has no token {unknown}: its vocabulary has {num_ids}"
    return reasons
