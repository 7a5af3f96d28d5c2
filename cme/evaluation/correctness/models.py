"""The models of a run, each loaded when it is first needed."""

from __future__ import annotations

import copy
import warnings
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cme.demo.models import local_path
from cme.evaluation.correctness.options import Options
from cme.loading import load_model
from cme.rendering import unescaped
from cme.verifier import Verifier


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
        return self._verifier(*self._load(self._options.generator, "generator"), template="auto")

    @cached_property
    def verifier(self) -> Verifier:
        return self._verifier(*self._load(self._options.verifier, "verifier"))

    def random_verifier(self, seed: int) -> Verifier:
        """The verifier's architecture and tokenizer, with weights as they are before any training."""
        real = self.verifier
        model = real.model
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random = AutoModelForCausalLM.from_config(
                copy.deepcopy(model.config),
                dtype=model.dtype,
                trust_remote_code=self._options.trust_remote_code,
                attn_implementation="sdpa",
            )
        return self._verifier(random.to(model.device), real.renderer.tokenizer)

    def _verifier(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None = None
    ) -> Verifier:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a model is scored unpacked changes no score
            return Verifier.of(
                model,
                tokenizer,
                template=unescaped(template or self._options.template),
                max_batch_tokens=self._options.max_batch_tokens,
            )

    def _load(self, name: str, role: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_model(
            local_path(name),
            role,
            dtype=self._options.dtype,
            device=self._options.device,
            trust_remote_code=self._options.trust_remote_code,
        )
