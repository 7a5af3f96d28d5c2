"""Requests -> statistics of their tokens -> what they say about a response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cme.alignment import Alignment
from cme.errors import ModelError
from cme.feed_forward import in_chunks
from cme.lm_head import input_device, num_ids, score_batch
from cme.memory import FEWEST_TOKENS, is_out_of_memory, keep_freed_memory, release, token_budget, trim
from cme.packing import Batch, Request, make_batches
from cme.rope import same_frequencies
from cme_kernels import TokenStats

if TYPE_CHECKING:
    import pandas


def score_requests(
    model: PreTrainedModel,
    requests: Sequence[Request],
    stats: Sequence[str] = (),
    *,
    max_batch_tokens: int | Literal["auto"] = "auto",
    packed: bool = True,
    on_scored: Callable[[int], object] = lambda count: None,
) -> list[TokenStats | str]:
    """Statistics of each request's response tokens, on the CPU, in the order of `requests`. Equal requests are
    computed once.

    In the place of a request that can't be scored is the reason: a token that the model doesn't know, or more
    tokens than there is memory for.

    Args:
        max_batch_tokens: most tokens in one forward pass; "auto" is `cme.memory.token_budget`. Where memory runs
            out, half as many are tried, down to one request at a time.
        on_scored: called after each batch with the number of requests in it.

    Raises:
        ValueError: a budget that is not positive.
        MemoryError: there is none left even for a request no longer than others that were scored.
    """
    if max_batch_tokens != "auto" and max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens must be positive or 'auto', not {max_batch_tokens}")
    copies = Counter(requests)
    results = _with_unknown_tokens(copies, num_ids(model))
    on_scored(sum(copies[request] for request in results))
    budget = token_budget(model) if max_batch_tokens == "auto" else max_batch_tokens
    with torch.inference_mode(), keep_freed_memory(), in_chunks(model):
        for part in same_frequencies(model.config, [request for request in copies if request not in results]):
            for scored in _score_part(model, part, stats, budget, packed):
                results.update(scored)
                trim()  # else the results pin the memory of the pass around them
                on_scored(sum(copies[request] for request in scored))
    return [results[request] for request in requests]


def _score_part(
    model: PreTrainedModel, requests: Sequence[Request], stats: Sequence[str], budget: int, packed: bool
) -> Iterator[dict[Request, TokenStats | str]]:
    """The results of requests that may share a batch, a batch at a time. Where memory runs out, what is left goes
    on with half the budget."""
    device = input_device(model)
    left = dict.fromkeys(requests)
    fitted = FEWEST_TOKENS  # most tokens of which a pass is sure not to be what memory is too small for
    while left:
        waiting = list(left)
        for batch in make_batches(waiting, budget, device, packed):
            members = [waiting[i] for i in batch.members]
            scored = _scored_if_memory_lasts(model, batch, stats)
            tokens = batch.inputs["input_ids"].numel()
            if scored is not None:
                fitted = max(fitted, tokens)
            else:
                release(device)
                if len(members) > 1:
                    budget = min(budget, tokens) // 2
                    break
                if tokens <= fitted:
                    raise MemoryError(
                        f"out of memory in a forward pass over {tokens} tokens: something else took it"
                    )
                scored = [_out_of_memory(tokens)]
            for request in members:
                del left[request]
            yield dict(zip(members, scored, strict=True))


def _scored_if_memory_lasts(
    model: PreTrainedModel, batch: Batch, stats: Sequence[str]
) -> list[TokenStats | str] | None:
    # The error holds the tensors of the failed pass, so it must be gone before the next is tried
    try:
        return _split(score_batch(model, batch, stats), batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _out_of_memory(tokens: int) -> str:
    return (
        f"out of memory in a forward pass over this response alone, {tokens} tokens with its prompt: shorten it, "
        "load the model in bfloat16, or free memory"
    )


def _split(stats: TokenStats, batch: Batch) -> list[TokenStats | str]:
    columns = {
        name: value.cpu().split(batch.lengths)
        for name in TokenStats.names()
        if (value := getattr(stats, name)) is not None
    }
    return [TokenStats(**{n: parts[k] for n, parts in columns.items()}) for k in range(len(batch.members))]


def _with_unknown_tokens(requests: Iterable[Request], num_ids: int) -> dict[Request, TokenStats | str]:
    # Tokenizers may know added tokens, of images say, for which a text model has no row: on a GPU that would be an
    # assertion on the device, which ends the process
    reasons: dict[Request, TokenStats | str] = {}
    for request in requests:
        lowest, highest = (f(f(request.prompt), f(request.response)) for f in (min, max))
        if lowest < 0 or highest >= num_ids:
            unknown = lowest if lowest < 0 else highest
            reasons[request] = f"the verifier has no token {unknown}: its vocabulary has {num_ids}"
    return reasons


SIGNALS = (
    "mean_logprob",
    "sum_logprob",
    "perplexity",
    "mean_entropy",
    "bits_per_byte",
    "top1_rate",
    "num_tokens",
)
"""What is said about a response; see the properties of ResponseScore."""

SIGNAL_STATS = ("entropy", "max_logprob")
"""The statistics of tokens that all of SIGNALS need."""


@dataclass(frozen=True)
class TokenScore:
    """One token of a response under the verifier, given everything before it.

    Attributes:
        id: in the verifier's vocabulary.
        text: what the token decodes to on its own; "\ufffd" where it is a part of a character.
        start, end: its characters, response_text[start:end]. Tokens that are parts of one character all have that
            character; a space that the template put before the response has none, nor has the end of the turn.
        logprob: nats.
        entropy: of the verifier's distribution at this place, nats; None if not requested.
        top1: whether it was the verifier's first choice; None if not requested.
    """

    id: int
    text: str
    start: int
    end: int
    logprob: float
    entropy: float | None
    top1: bool | None


@dataclass(frozen=True)
class ResponseScore:
    """Statistics of a response's tokens under a verifier, given its prompt.

    Attributes:
        tokens: statistics a token, float32 on the CPU, shape [T]; None if the response could not be scored.
        token_ids: the T tokens in the verifier's vocabulary.
        num_bytes: length of the response in UTF-8.
        unscorable: why there is no score, else None.
        finished: whether the response ended by itself (True) or was cut off (False); None if nobody said.
        alignment: where the tokens lie in the response's text, if that was asked for.
        unaligned: why `alignment` could not be found where it was asked for, else None.
    """

    tokens: TokenStats | None
    token_ids: tuple[int, ...]
    num_bytes: int
    unscorable: str | None = None
    finished: bool | None = None
    alignment: Alignment | None = None
    unaligned: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def sum_logprob(self) -> float | None:
        """log p(response | prompt), nats."""
        return None if self.tokens is None else float(self.tokens.logprob.double().sum())

    @property
    def mean_logprob(self) -> float | None:
        """log p(response | prompt) / T, nats a token: the Cross-Model Entropy reward."""
        return None if self.tokens is None else float(self.tokens.logprob.double().mean())

    @property
    def perplexity(self) -> float | None:
        """exp(-mean_logprob); infinite where that exceeds the largest float."""
        mean = self.mean_logprob
        try:
            return None if mean is None else math.exp(-mean)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """-log2 p(response | prompt) / bytes: comparable between tokenizers."""
        total = self.sum_logprob
        return None if total is None else -total / (math.log(2) * self.num_bytes)

    @property
    def mean_entropy(self) -> float | None:
        """Mean entropy of the verifier's next-token distributions, nats; needs stats=("entropy",)."""
        return _mean(None if self.tokens is None else self.tokens.entropy)

    @property
    def top1_rate(self) -> float | None:
        """Share of tokens that were the verifier's most likely ones; needs stats=("max_logprob",)."""
        return _mean(None if self.tokens is None else _is_top1(self.tokens))

    def as_dict(self) -> dict[str, float | int | bool | str | None]:
        """SIGNALS, `finished` and `unscorable` by name. Signals are None where there is no score, or where what
        they need was not requested."""
        signals = {name: None if self.tokens is None else getattr(self, name) for name in SIGNALS}
        return {**signals, "finished": self.finished, "unscorable": self.unscorable}

    def per_token(self) -> list[TokenScore]:
        """The T tokens in order, none if there is no score. Needs token_spans=True.

        Raises ModelError if the tokens could not be found in the text (`unaligned`).
        """
        if self.tokens is None:
            return []
        alignment = self._aligned()
        unknown = [None] * self.num_tokens
        top1 = _is_top1(self.tokens)
        columns = zip(
            self.token_ids,
            alignment.pieces,
            alignment.spans,
            self.tokens.logprob.tolist(),
            unknown if self.tokens.entropy is None else self.tokens.entropy.tolist(),
            unknown if top1 is None else top1.tolist(),
            strict=True,
        )
        return [TokenScore(id_, text, *span, *values) for id_, text, span, *values in columns]

    def within(self, start: int, end: int) -> ResponseScore:
        """The part [start, end) of the response, in characters of its text, scored alone: given the prompt and the
        response before it, by the tokens that overlap it. Needs token_spans=True.

        `num_bytes` is that of the text which those tokens cover, which may be more than the part.
        Raises ModelError if the tokens could not be found in the text (`unaligned`).
        """
        if self.tokens is None:
            return self
        alignment = self._aligned()
        if not 0 <= start < end <= len(alignment.text):
            reason = f"the span [{start}, {end}) is not within the response's {len(alignment.text)} characters"
            return ResponseScore(None, (), 0, reason, self.finished)
        kept = [i for i, (a, b) in enumerate(alignment.spans) if a < end and b > start]
        if not kept:  # a tokenizer may drop characters
            return ResponseScore(None, (), 0, f"no token overlaps the span [{start}, {end})", self.finished)
        part = alignment.select(kept)
        covered = alignment.text[part.spans[0][0] : max(b for _, b in part.spans)]
        ids = tuple(self.token_ids[i] for i in kept)
        return ResponseScore(_select(self.tokens, kept), ids, len(covered.encode()), None, self.finished, part)

    def _aligned(self) -> Alignment:
        if self.unaligned is not None:
            raise ModelError(self.unaligned)
        if self.alignment is None:
            raise ValueError("where the tokens lie in the text was not asked for: score with token_spans=True")
        return self.alignment


def to_frame(scores: Iterable[ResponseScore]) -> pandas.DataFrame:
    """One row a response: `ResponseScore.as_dict`."""
    import pandas

    return pandas.DataFrame([score.as_dict() for score in scores], columns=[*SIGNALS, "finished", "unscorable"])


def tokens_to_frame(scores: Iterable[ResponseScore]) -> pandas.DataFrame:
    """One row a token: the fields of TokenScore, and `response`, the position of its response in `scores`. A
    response whose tokens could not be found in its text has none."""
    import pandas

    rows = [
        {"response": i, **asdict(token)}
        for i, score in enumerate(scores)
        if score.unaligned is None
        for token in score.per_token()
    ]
    return pandas.DataFrame(rows, columns=["response", *(f.name for f in fields(TokenScore))])


def _is_top1(tokens: TokenStats) -> Tensor | None:
    return None if tokens.max_logprob is None else tokens.logprob >= tokens.max_logprob


def _select(tokens: TokenStats, index: list[int]) -> TokenStats:
    columns = {name: value[index] for name in TokenStats.names() if (value := getattr(tokens, name)) is not None}
    return TokenStats(**columns)


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.double().mean())
