"""From a language model in transformers to log-probabilities, without its logits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cme.errors import ModelError
from cme_kernels import TokenStats, linear_logprob
from cme_kernels.stats import LogitTransform


class UnsupportedModelError(ModelError):
    """The model's output is not one linear projection that `linear_logprob` can stand in for."""


@dataclass(frozen=True)
class LMHead:
    """The last layer of a causal language model, and what the model does to its output.

    Attributes:
        projection: the output embedding, weight [V, H].
        softcap: bound of the logits (Gemma 2 and later, RecurrentGemma, xLSTM).
        scale: factor on the projection (Cohere, Granite, Falcon-H1).

    Both are what `measure_head` found, else what the configuration says.
    """

    projection: nn.Linear
    softcap: float | None
    scale: float

    @staticmethod
    def of(model: PreTrainedModel) -> LMHead:
        """Read the head off `model`. Raises UnsupportedModelError unless it is one nn.Linear."""
        head = model.get_output_embeddings()
        # A subclass with a forward of its own (quantised) computes something else; FSDP's wrapper has none
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise UnsupportedModelError(
                f"{type(model).__name__}'s output layer is {type(head).__name__}, not a plain torch.nn.Linear; "
                "leave the head out of LoRA and out of quantisation, or merge adapters with merge_and_unload()"
            )
        return LMHead(head, *getattr(head, _MEASURED, _named(model.config.get_text_config())))

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


def _named(config: PretrainedConfig) -> tuple[float | None, float]:
    """Softcap and scale by the names that families in transformers have for them."""

    def first(*names: str) -> float | None:
        values = (getattr(config, name, None) for name in names)
        return next((float(value) for value in values if isinstance(value, int | float)), None)

    scale = first("logit_scale", "lm_head_multiplier", "output_multiplier")
    divisor = first("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    cap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return cap, 1.0 if scale is None else scale


_MEASURED = "_cme_softcap_and_scale"
"""Attribute of a head: what `measure_head` found, where names do not tell."""


@torch.no_grad()
def measure_head(model: PreTrainedModel) -> None:
    """Find softcap and scale by what `model` makes of given hidden states, where no name tells. One forward pass
    over two tokens. Whether they are all that the model does, the self-check says."""
    head = LMHead.of(model)
    with align_module_device(head.projection):  # brings the weight back if it is offloaded
        weight = head.projection.weight
        probe = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        largest = torch.tensor([[1 / 16], [512.0]]).to(weight)  # too small for a cap to matter, and large enough
        probe *= largest / head.projection(probe).abs().amax(1, keepdim=True)
        z = head.projection(probe).double()
    tokens = torch.full((1, 2), num_ids(model) // 2, device=input_device(model))
    try:
        with hidden_states_replaced(model, probe):
            logits = model(input_ids=tokens, use_cache=False).logits[0]
    except Exception:  # the self-check meets it again, and says what it is
        return
    logits = logits.to(z)
    named = LogitTransform(head.softcap, head.scale).apply_(z.clone())
    if logits.shape != z.shape or torch.allclose(named, logits, rtol=1e-2, atol=1e-3):  # 16-bit weights round
        return
    cap, scale = _fit(z, logits)
    if math.isfinite(scale):  # else it makes something else of them than a factor
        setattr(head.projection, _MEASURED, (cap, scale))


@contextlib.contextmanager
def hidden_states_replaced(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Give the head of `model` these hidden states [N, H], whatever its backbone computes of N tokens."""

    def replace(module: nn.Module, inputs: object, output: Any) -> Any:
        output.last_hidden_state = hidden[None]
        return output

    backbone = backbone_of(model)
    bodies = {backbone, getattr(backbone, "decoder", backbone)}  # OPT calls the decoder in its backbone
    hooks = [body.register_forward_hook(replace) for body in bodies]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fit(z: Tensor, logits: Tensor) -> tuple[float | None, float]:
    """Softcap and scale of softcap * tanh(scale * z / softcap) = logits [2, V], small and large ones."""
    scale = float((z[0] * logits[0]).sum() / z[0].square().sum())
    largest = float(logits[1].abs().max())
    if not largest < abs(scale) * float(z[1].abs().max()) / 2:
        return None, scale
    uncapped = largest * torch.atanh(logits[0] / largest)
    return largest, float((z[0] * uncapped).sum() / z[0].square().sum())


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
