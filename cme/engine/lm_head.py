"""The head of a language model in transformers: from hidden states to log-probabilities, without its logits."""

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
    """The last layer of a causal language model, and the functions of its output that give the logits.

    Attributes:
        projection: the output embedding, weight [V, H].
        softcap: bound of the logits (Gemma 2 and later, RecurrentGemma, xLSTM).
        scale: factor on the projection (Cohere, Granite, Falcon-H1).

    Softcap and scale are those that `measure_head` found, else those of the configuration.
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
        return LMHead(head, *getattr(head, _MEASURED, _from_config(model.config.get_text_config())))

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


def _from_config(config: PretrainedConfig) -> tuple[float | None, float]:
    """Softcap and scale, by the names that families in transformers have for them."""

    def first(*names: str) -> float | None:
        values = (getattr(config, name, None) for name in names)
        return next((float(value) for value in values if isinstance(value, int | float)), None)

    scale = first("logit_scale", "lm_head_multiplier", "output_multiplier")
    divisor = first("logits_scaling")
    # Granite divides by `logits_scaling`; HyperCLOVA X multiplies by it
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    cap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return cap, 1.0 if scale is None else scale


_MEASURED = "_cme_softcap_and_scale"
"""Attribute of a head's projection: (softcap, scale) that were measured, where the configuration has them not."""


@torch.no_grad()
def measure_head(model: PreTrainedModel) -> None:
    """Measure softcap and scale in one forward pass over two tokens with given hidden states, and keep them with
    the head if they are not those of the configuration.

    A fit proves nothing: that a model does no more than these two is left to the self-check.
    """
    head = LMHead.of(model)
    with align_module_device(head.projection):  # brings the weight back if it is offloaded
        weight = head.projection.weight
        probe = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)  # [2, H]
        # The largest projection of each row: too small for a cap to matter, and far beyond any cap
        largest = torch.tensor([[1 / 16], [512.0]]).to(weight)
        probe *= largest / head.projection(probe).abs().amax(1, keepdim=True)
        x = head.projection(probe).double()  # [2, V]
    tokens = torch.full((1, 2), num_ids(model) // 2, device=input_device(model))
    try:
        with hidden_states_replaced(model, probe):
            logits = model(input_ids=tokens, use_cache=False).logits[0]
    except Exception:  # the self-check meets it again, and says what it is
        return
    logits = logits.to(x)
    configured = LogitTransform(head.softcap, head.scale).apply_(x.clone())
    if logits.shape != x.shape or torch.allclose(configured, logits, rtol=1e-2, atol=1e-3):  # 16-bit weights round
        return
    cap, scale = _fit(x, logits)
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


def _fit(x: Tensor, logits: Tensor) -> tuple[float | None, float]:
    """Softcap c and scale a of c tanh(a x / c) = logits, or of a x = logits. [2, V]: a row of small numbers, and a
    row of large ones."""

    def slope(y: Tensor) -> float:
        # Least squares: the a that minimises |a x - y|^2 over the small numbers
        return float((x[0] * y).sum() / x[0].square().sum())

    # Near 0 tanh is the identity, so a x = logits there. Far from 0 tanh is 1, so the largest logit is c
    scale, cap = slope(logits[0]), float(logits[1].abs().max())
    if not cap < abs(scale) * float(x[1].abs().max()) / 2:  # it grew with x
        return None, scale
    # With c known, what little tanh bends near 0 is undone: a x = c atanh(logits / c)
    return cap, slope(cap * torch.atanh(logits[0] / cap))


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    backbone: nn.Module = model.base_model
    if backbone is model:
        backbone = getattr(model, "model", model)  # Llama 4 keeps it under a name that is not its prefix
    if backbone is model:
        raise UnsupportedModelError(f"{type(model).__name__} has no backbone apart from its head")
    return backbone


def num_ids(model: PreTrainedModel) -> int:
    """Number of tokens that the model both reads and predicts: its embedding or its head may have padding rows."""
    embedding: Any = model.get_input_embeddings()
    return int(min(embedding.weight.shape[0], LMHead.of(model).projection.weight.shape[0]))


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which the first layer runs. The weights of a model with a `device_map` may lie elsewhere."""
    # accelerate's, which moves inputs and weights there for each call
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)
