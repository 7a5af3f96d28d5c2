"""A frozen causal language model that says how likely a text is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.engine.attention import IMPLEMENTATION
from cme.engine.forward import score_requests
from cme.engine.lm_head import measure_head, num_ids
from cme.engine.packing import Request
from cme.engine.selfcheck import why_not_packed, why_not_scored
from cme.errors import ModelError, TemplateError
from cme.models import load_model, without_adapters
from cme.scores import ResponseScore
from cme.text.messages import Conversations, Messages, is_continued, text_of
from cme.text.rendering import Renderer
from cme.text.tokens import Aligner
from cme_kernels import TokenStats

EMPTY_RESPONSE = "the response is empty"


@dataclass(frozen=True)
class Verifier:
    """Scores responses, each prompt encoded once for all of its responses.

    Attributes:
        model: in evaluation mode, its weights without gradients.
        renderer: how prompts and responses become the model's tokens.
        packed: the model passed the self-check; otherwise right-padded batches are used, which are slower.
        max_batch_tokens: most tokens in one forward pass; "auto" goes by the free memory.
    """

    model: PreTrainedModel
    renderer: Renderer
    packed: bool
    max_batch_tokens: int | Literal["auto"] = "auto"

    @staticmethod
    def from_pretrained(
        name: str,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        template: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        score_thoughts: bool = True,
        max_batch_tokens: int | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> Verifier:
        """Load `name`, a hub id, a local folder, or a demo's model.

        Args:
            dtype: of the weights; default the checkpoint's own, and float32 on a CPU.
            device: default the accelerator if there is one.
            template: "chat" (the tokenizer's chat template), a text with {prompt} and {response}, or "auto": the
                chat template if there is one, else `cme.text.templates.PLAIN_TEMPLATE`.
            chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
            score_thoughts: score a response as it was written, with its thoughts (`<think>…</think>`, or the
                reasoning in a field of a message); if False, only its answer after them, as an answer to the
                prompt. A response whose thoughts don't end has no score then.
            max_batch_tokens: most tokens in one forward pass. "auto" goes by the free memory; where memory runs
                out all the same, half as many are tried.
            kwargs: for transformers' `from_pretrained`, such as `revision`, or `device_map="auto"` to spread the
                model over several devices.

        Raises:
            ModelError: the model can't be loaded, or can't be scored exactly.
            TemplateError: the template does not fit.
        """
        model, tokenizer = load_model(name, "verifier", dtype=dtype, device=device, **kwargs)
        return Verifier.of(
            model,
            tokenizer,
            template=template,
            chat_template_kwargs=chat_template_kwargs,
            score_thoughts=score_thoughts,
            max_batch_tokens=max_batch_tokens,
        )

    @staticmethod
    def of(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        score_thoughts: bool = True,
        max_batch_tokens: int | Literal["auto"] = "auto",
    ) -> Verifier:
        """Freeze `model` and prove on a few short sequences that its scores are those of plain forward passes.

        Of a PEFT model the adapters are scored as they are, except in the head, or where they are virtual tokens.

        Raises ModelError if they are not, even in right-padded batches.
        """
        renderer = Renderer.of(tokenizer, template, chat_template_kwargs, score_thoughts)
        _check_adapters(model)
        model = without_adapters(model).eval().requires_grad_(False)
        _check_vocabulary(model, tokenizer)
        measure_head(model)
        why_not = _choose_packed_attention(model) or why_not_packed(model)
        if why_not is not None:
            broken = _choose_padded_attention(model)
            if broken is not None:
                raise ModelError(f"{type(model).__name__} can't be scored exactly: {broken}")
            name = type(model).__name__
            warnings.warn(f"{name} is scored in right-padded batches, not in packs: {why_not}", stacklevel=2)
        return Verifier(model, renderer, why_not is None, max_batch_tokens)

    @cached_property
    def context_length(self) -> int | None:
        """Most tokens that a prompt and its response may have together; None if the model sets no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def at(self, now: datetime) -> Verifier:
        """This verifier at another time, which its chat template may write."""
        return replace(self, renderer=replace(self.renderer, now=now))

    def score(
        self,
        prompts: Conversations,
        responses: Conversations,
        *,
        stats: Sequence[str] = (),
        finished: Sequence[bool | None] | None = None,
        score_end_of_turn: bool = False,
        token_spans: bool = False,
        progress: bool = False,
        on_scored: Callable[[int], object] = lambda count: None,
    ) -> list[ResponseScore]:
        """Score `responses[i]` as the continuation of `prompts[i]`. Equal prompts are encoded once.

        Args:
            prompts, responses: texts, or conversations in the chat format.
            stats: statistics of tokens besides the log-probabilities, as in `linear_logprob`;
                `cme.scores.SIGNAL_STATS` for all signals.
            finished: per response True if it ended by itself, False if it was cut off, None if nobody knows.
            score_end_of_turn: also score the token that ends the turn, of the responses that ended by themselves.
            token_spans: find each token in the response's text, for `ResponseScore.per_token` and `.within`.
            progress: show a progress bar.
            on_scored: called after each forward pass with the number of responses in it.

        Returns:
            One score per response, in order. A response that can't be scored (it is empty, too long for the
            context or for the memory, or has log-probabilities that are not finite) has `unscorable`, the reason.
        """
        if len(prompts) != len(responses):
            raise ValueError(
                f"{len(prompts)} prompts but {len(responses)} responses: give one prompt per response"
            )
        known = [None] * len(responses) if finished is None else finished
        if len(known) != len(responses):
            raise ValueError(f"`finished` has {len(known)} values for {len(responses)} responses")
        prompt_ids = self._prompt_ids()
        rendered = [
            self._render(prompt, response, prompt_ids, end_of_turn=bool(score_end_of_turn and done))
            for prompt, response, done in zip(prompts, responses, known, strict=True)
        ]
        scorable = {i: Request(r.prompt, r.response) for i, r in enumerate(rendered) if r.unscorable is None}
        with tqdm(total=len(scorable), desc="scoring", unit=" responses", disable=not progress) as bar:
            scored = score_requests(
                self.model,
                list(scorable.values()),
                stats,
                max_batch_tokens=self.max_batch_tokens,
                packed=self.packed,
                on_scored=lambda count: (bar.update(count), on_scored(count)),
            )
        results = dict(zip(scorable, scored, strict=True))
        return [self._response_score(r, results.get(i), known[i], token_spans) for i, r in enumerate(rendered)]

    def score_stream(
        self,
        pairs: Iterable[
            tuple[str | Messages, str | Messages] | tuple[str | Messages, str | Messages, bool | None]
        ],
        *,
        chunk_size: int = 1024,
        stats: Sequence[str] = (),
        score_end_of_turn: bool = False,
        token_spans: bool = False,
    ) -> Iterator[ResponseScore]:
        """Scores of (prompt, response) pairs, or (prompt, response, finished) triples, in order, as they come.

        `chunk_size` of them are read ahead and scored together: equal prompts share their encoding within a chunk,
        and no more than a chunk is in memory.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, not {chunk_size}")
        source = iter(pairs)
        while chunk := list(islice(source, chunk_size)):
            prompts, responses, *finished = zip(*chunk, strict=True)
            yield from self.score(
                prompts,
                responses,
                stats=stats,
                finished=finished[0] if finished else None,
                score_end_of_turn=score_end_of_turn,
                token_spans=token_spans,
            )

    def _prompt_ids(self) -> Callable[[str | Messages], tuple[int, ...]]:
        """Tokens of prompts, one object for equal prompts: they may be long, and have many responses."""
        known: dict[str, tuple[int, ...]] = {}

        def prompt_ids(prompt: str | Messages) -> tuple[int, ...]:
            key = repr(prompt)  # a conversation is no key; quoted, no text is taken for one
            if key not in known:
                known[key] = self.renderer.prompt_ids(prompt)
            return known[key]

        return prompt_ids

    def _render(
        self,
        prompt: str | Messages,
        response: str | Messages,
        prompt_ids_of: Callable[[str | Messages], tuple[int, ...]],
        end_of_turn: bool,
    ) -> _Rendered:
        try:
            text = self.renderer.response_text(response)
            reason = self._why_not_rendered(prompt, text)
            if reason is not None:
                return _Rendered(text, unscorable=reason)
            prompt_ids = prompt_ids_of(prompt)
            continued = is_continued(prompt)
            response_ids = self.renderer.response_ids(text, continued=continued)
            if response_ids and end_of_turn:
                response_ids += self.renderer.end_of_turn_ids
        except TemplateError as error:
            return _Rendered(text_of(response), unscorable=str(error))
        return _Rendered(text, prompt_ids, response_ids, self._why_unscorable(prompt_ids, response_ids), continued)

    def _why_not_rendered(self, prompt: str | Messages, response: str) -> str | None:
        """The reason not to tokenise, which takes minutes of a huge text: not valid, or certainly too long."""
        for name, text in (("prompt", text_of(prompt)), ("response", response)):
            if not _is_unicode(text):
                return f"the {name} is not valid Unicode: it holds half of a surrogate pair"
            if self.context_length is not None and len(text) > self.context_length * self._longest_token:
                return (
                    f"the {name}'s {len(text)} characters exceed the verifier's context of {self.context_length}"
                )
        return None

    def _why_unscorable(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> str | None:
        if not response:
            return EMPTY_RESPONSE
        if not prompt:
            return "the prompt is empty"
        limit = self.context_length
        if limit is not None and len(prompt) + len(response) > limit:
            return (
                f"the prompt's {len(prompt)} and the response's {len(response)} tokens exceed "
                f"the verifier's context of {limit}"
            )
        return None

    def _response_score(
        self, rendered: _Rendered, result: TokenStats | str | None, finished: bool | None, token_spans: bool
    ) -> ResponseScore:
        """The score of a rendered response; `result` is a text if the forward pass was not possible."""
        tokens, unscorable = (None, result) if isinstance(result, str) else (result, rendered.unscorable)
        if tokens is not None and not tokens.logprob.isfinite().all():
            tokens, unscorable = None, "the verifier's log-probabilities are not finite"
        alignment = unaligned = None
        if token_spans and tokens is not None:
            contexts = self.renderer.contexts(rendered.text, continued=rendered.continued)
            try:
                alignment = self._aligner.align(rendered.text, rendered.response, contexts)
            except ModelError as error:
                unaligned = str(error)
        num_bytes = len(rendered.text.encode(errors="surrogatepass"))
        return ResponseScore(tokens, rendered.response, num_bytes, unscorable, finished, alignment, unaligned)

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.renderer.tokenizer.get_vocab()))

    @cached_property
    def _aligner(self) -> Aligner:
        return Aligner(self.renderer.encoder)


def random_verifier(verifier: Verifier, seed: int = 0) -> Verifier:
    """The verifier's architecture, tokenizer and template, with weights as they are before pretraining."""
    model = verifier.model
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    renderer = verifier.renderer
    return Verifier.of(
        fresh.to(model.device),
        renderer.tokenizer,
        template=renderer.template or "chat",
        chat_template_kwargs=renderer.chat_template_kwargs,
        score_thoughts=renderer.score_thoughts,
        max_batch_tokens=verifier.max_batch_tokens,
    )


@dataclass(frozen=True)
class _Rendered:
    text: str
    prompt: tuple[int, ...] = ()
    response: tuple[int, ...] = ()
    unscorable: str | None = None
    continued: bool = False


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_adapters(model: Any) -> None:
    peft_config = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ModelError(
            f"{type(model).__name__} with {peft_config.peft_type.value} puts virtual tokens before the prompt, "
            "which can't be scored: use adapters in the layers (LoRA), or merge_and_unload() such a model"
        )


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # Without its added tokens, which a model that never meets them need not know
    if tokenizer.vocab_size > num_ids(model):
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has {tokenizer.vocab_size} tokens and the model only "
            f"{num_ids(model)}: it does not belong to this model"
        )


def _choose_packed_attention(model: PreTrainedModel) -> str | None:
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, NotImplementedError, AttributeError) as error:
        return f"it can't use another attention function: {error}"
    return None


def _choose_padded_attention(model: PreTrainedModel) -> str | None:
    broken = "it knows neither eager nor SDPA attention"
    # Some models mask, or apply their index, only for attention functions that they know, and not for ours
    for own in ("sdpa", "eager"):
        try:
            model.set_attn_implementation(own)
        except (ValueError, NotImplementedError, AttributeError):
            continue
        reason = why_not_scored(model)
        if reason is None:
            return None
        broken = reason
    return broken
