"""From a language model in transformers to log-probabilities, without its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cme.errors import ModelError
from cme.packing import Batch
from cme_kernels import TokenStats, linear_logprob


class UnsupportedModelError(ModelError):
    """The model's output is not one linear projection that `linear_logprob` can stand in for."""


@dataclass(frozen=True)
class LMHead:
    """The last layer of a causal language model, and what the model does to its output.

    Attributes:
        projection: the output embedding, weight [V, H].
        softcap: bound of the logits (Gemma 2 and later, RecurrentGemma, xLSTM).
        scale: factor on the projection (Cohere, Granite, Falcon-H1).
    """

    projection: nn.Linear
    softcap: float | None
    scale: float

    @staticmethod
    def of(model: PreTrainedModel) -> LMHead:
        """Read the head off `model`. Raises UnsupportedModelError unless it is one nn.Linear."""
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        # A subclass with a forward of its own (quantised) computes something else; FSDP's wrapper has none
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise UnsupportedModelError(
                f"{type(model).__name__}'s output layer is {type(head).__name__}, not a plain torch.nn.Linear; "
                "leave the head out of LoRA and out of quantisation"
            )
        return LMHead(head, _softcap(config), _scale(config))

    def token_stats(
        self, hidden: Tensor, targets: Tensor, stats: Sequence[str] = (), temperature: float = 1.0
    ) -> TokenStats:
        """Statistics of `targets` [N] under the logits of `hidden` [N, H]. See `linear_logprob`."""
        with align_module_device(self.projection):  # brings the weight back if it is offloaded
            weight = self.projection.weight
            return linear_logprob(
                hidden.to(weight.device),
                weight,
                targets.to(weight.device),
                bias=self.projection.bias,
                softcap=self.softcap,
                logit_scale=self.scale,
                temperature=temperature,
                stats=stats,
            )


def _softcap(config: PretrainedConfig) -> float | None:
    # Gemma's name, and those of RecurrentGemma and xLSTM
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _scale(config: PretrainedConfig) -> float:
    # Each of these is how one family in transformers names the factor between projection and logits
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    backbone: nn.Module = model.base_model
    if backbone is model:
        backbone = getattr(model, "model", model)  # Llama 4 keeps it under a name that is not its prefix
    if backbone is model:
        raise UnsupportedModelError(f"{type(model).__name__} has no backbone apart from its head")
    return backbone


def num_ids(model: PreTrainedModel) -> int:
    """Tokens that the model both reads and predicts: its embedding or its head may have rows that pad."""
    embedding: Any = model.get_input_embeddings()
    return int(min(embedding.weight.shape[0], LMHead.of(model).projection.weight.shape[0]))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the first layer runs. Of a model spread by `device_map` the weights may lie elsewhere."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def score_batch(
    model: PreTrainedModel,
    batch: Batch,
    stats: Sequence[str] = (),
    temperature: float = 1.0,
) -> TokenStats:
    """One forward pass over `batch`: statistics of its N response tokens, in the order of `batch.members`."""
    hidden = backbone_of(model)(**batch.inputs, use_cache=False).last_hidden_state
    rows = hidden.flatten(0, 1).index_select(0, batch.rows.to(hidden.device))
    return LMHead.of(model).token_stats(rows, batch.targets, stats, temperature)
