"""The models of a run, each loaded when it is first needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.evaluation.correctness.options import Options
from cme.models import load_model
from cme.text.rendering import unescaped
from cme.verifier import Verifier, random_verifier


@contextmanager
def _unpacked_silently() -> Iterator[None]:
    """Without the warning that a model is scored unpacked, which changes no score."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class Models:
    def __init__(self, options: Options) -> None:
        self._options = options

    def generator(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """To sample from."""
        assert self._options.generator is not None
        return self._load(self._options.generator, "generator")

    def generator_as_verifier(self) -> Verifier:
        """Scores responses given the prompt that they were sampled from."""
        assert self._options.generator is not None
        return self._verifier(
            *self._load(self._options.generator, "generator"),
            template="auto",
            chat_template_kwargs=self._options.generation.chat_template_kwargs,
        )

    @cached_property
    def verifier(self) -> Verifier:
        return self._verifier(
            *self._load(self._options.verifier, "verifier"),
            template=unescaped(self._options.template),
            chat_template_kwargs=self._options.verifier_chat_template_kwargs,
        )

    def random_verifier(self, seed: int) -> Verifier:
        with _unpacked_silently():
            return random_verifier(self.verifier, seed)

    def _verifier(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        chat_template_kwargs: Mapping[str, Any],
    ) -> Verifier:
        with _unpacked_silently():
            return Verifier.of(
                model,
                tokenizer,
                template=template,
                chat_template_kwargs=chat_template_kwargs,
                max_batch_tokens=self._options.max_batch_tokens,
            )

    def _load(self, name: str, role: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_model(name, role, **self._options.models.kwargs())
