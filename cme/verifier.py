"""A frozen causal language model that says how likely a text is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.attention import IMPLEMENTATION
from cme.errors import ModelError
from cme.lm_head import LMHead
from cme.loading import load_model
from cme.packing import Request
from cme.rendering import Messages, Renderer, text_of
from cme.scoring import ResponseScore, score_requests
from cme.selfcheck import why_not_packed, why_not_scored
from cme_kernels import TokenStats


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
        max_batch_tokens: int | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> Verifier:
        """Load `name`, a hub id or a local folder.

        Args:
            dtype: of the weights; default the checkpoint's own, and float32 on a CPU.
            device: default the accelerator if there is one.
            template: "chat" (the tokenizer's chat template), a text with {prompt} and {response}, or "auto": the
                chat template if there is one, else `cme.rendering.PLAIN_TEMPLATE`.
            max_batch_tokens: most tokens in one forward pass. "auto" goes by the free memory; where memory runs
                out all the same, half as many are tried.
            kwargs: for transformers' `from_pretrained`, such as `revision`, or `device_map="auto"` to spread the
                model over several devices.

        Raises:
            ModelError: the model can't be loaded, or can't be scored exactly.
            TemplateError: the template does not fit.
        """
        model, tokenizer = load_model(name, "verifier", dtype=dtype, device=device, **kwargs)
        return Verifier.of(model, tokenizer, template=template, max_batch_tokens=max_batch_tokens)

    @staticmethod
    def of(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "auto",
        max_batch_tokens: int | Literal["auto"] = "auto",
    ) -> Verifier:
        """Freeze `model` and prove on a few short sequences that its scores are those of plain forward passes.

        Raises ModelError if they are not, even in right-padded batches.
        """
        renderer = Renderer.of(tokenizer, template)
        model.eval().requires_grad_(False)
        LMHead.of(model)
        why_not = _choose_packed_attention(model) or why_not_packed(model)
        if why_not is not None:
            broken = why_not_scored(model)
            if broken is not None:
                raise ModelError(
                    f"{type(model).__name__} can't be scored exactly: {broken}. Its final layers do more than one "
                    "linear projection, or its weights are broken."
                )
            warnings.warn(
                f"{type(model).__name__} is scored in right-padded batches, not in packs: {why_not}", stacklevel=2
            )
        return Verifier(model, renderer, why_not is None, max_batch_tokens)

    @property
    def context_length(self) -> int | None:
        """Most tokens that a prompt and its response may have together; None if the model sets no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def score(
        self,
        prompts: Sequence[str | Messages],
        responses: Sequence[str | Messages],
        *,
        stats: Sequence[str] = (),
        progress: bool = False,
    ) -> list[ResponseScore]:
        """Score `responses[i]` as the continuation of `prompts[i]`. Equal prompts are encoded once.

        Args:
            prompts, responses: texts, or conversations in the chat format.
            stats: what to compute besides the log-probabilities, as in `linear_logprob`.
            progress: show a progress bar.

        Returns:
            One score a response, in order. What can't be scored (an empty response, one that is too long for the
            model's context, one whose log-probabilities are not finite) has `unscorable` set to the reason.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses: give one prompt a response")
        ids = [self._render(p, r) for p, r in zip(prompts, responses, strict=True)]
        reasons = [self._why_unscorable(*pair) for pair in ids]
        scorable = [i for i, reason in enumerate(reasons) if reason is None]
        with tqdm(total=len(scorable), desc="scoring", unit=" responses", disable=not progress) as bar:
            scored = score_requests(
                self.model,
                [Request(*ids[i]) for i in scorable],
                stats,
                max_batch_tokens=self.max_batch_tokens,
                packed=self.packed,
                on_scored=bar.update,
            )
        tokens: dict[int, TokenStats] = dict(zip(scorable, scored, strict=True))
        return [
            _response_score(tokens.get(i), ids[i][1], text_of(response), reasons[i])
            for i, response in enumerate(responses)
        ]

    def _render(self, prompt: str | Messages, response: str | Messages) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.renderer.prompt_ids(prompt), self.renderer.response_ids(response)

    def _why_unscorable(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> str | None:
        if not response:
            return "the response is empty"
        limit = self.context_length
        if limit is not None and len(prompt) + len(response) > limit:
            return (
                f"the prompt's {len(prompt)} and the response's {len(response)} tokens exceed "
                f"the verifier's context of {limit}"
            )
        return None


def _response_score(
    tokens: TokenStats | None, token_ids: tuple[int, ...], text: str, unscorable: str | None
) -> ResponseScore:
    if tokens is not None and not tokens.logprob.isfinite().all():
        tokens, unscorable = None, "the verifier's log-probabilities are not finite"
    return ResponseScore(tokens, token_ids, len(text.encode()), unscorable)


def _choose_packed_attention(model: PreTrainedModel) -> str | None:
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, NotImplementedError, AttributeError) as error:
        return f"it can't use another attention function: {error}"
    return None
