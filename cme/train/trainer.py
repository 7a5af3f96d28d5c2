"""TRL's GRPOTrainer with each prompt encoded once: in sampling, and in log-probabilities from packs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.trainer_pt_utils import get_model_param_count
from trl import GRPOTrainer

from cme.engine.attention import IMPLEMENTATION
from cme.engine.lm_head import LMHead, UnsupportedModelError
from cme.engine.rope import follows_length
from cme.engine.selfcheck import why_not_packed
from cme.errors import CMEError
from cme.models import load_model, without_adapters
from cme.train.prefill import add_packed_forward, add_shared_prefill, packed_logprobs

Rows = dict[str, Any]
"""Tensors of a generation batch; those with dimensions have one entry per row."""


class TokenRewards(Protocol):
    """A reward that also has a value per token."""

    @property
    def token_rewards(self) -> Sequence[Sequence[float] | None]:
        """Values of each response's tokens in the last call; None for a response without."""


class PackedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer in which completions of one prompt share its encoding in every pass over the policy.

    Log-probabilities and entropies equal TRL's to rounding, and so does each optimizer step's gradient: a step has
    TRL's rows, and micro-batches have whole groups where that leaves its gradient as it was. The exception is a
    model with learned positions that go by the column, such as GPT-2: in TRL's log-probabilities they count the
    padding before a prompt, as they do not in sampling and here.

    Where packs can't be used (multimodal input, auxiliary router losses, prompt-learning adapters, an LM head that
    is no plain linear layer, DeepSpeed ZeRO-3, a model that fails the self-check) it is TRL's own path, and a
    warning says so.

    The methods of GRPOTrainer and Trainer that are overridden, most of them private ones:
        train: words an error.
        _load_from_checkpoint: resumes from weights that Trainer would pass over.
        _run_epoch: takes no step more than asked for.
        _prepare_inputs: brings the rows of a prompt into one micro-batch.
        _generate_and_score_completions: gives tokens advantages of their own.
        _get_per_token_logps_and_entropies: computes them from packs.

    Args:
        model: a model instance, plain or PEFT. Its attention implementation is replaced where packs are used.
        dense: one of `reward_funcs`, if the tokens of a response are to have advantages of their own.
        args, kwargs: as in GRPOTrainer.
    """

    def __init__(
        self, model: PreTrainedModel, *args: Any, dense: TokenRewards | None = None, **kwargs: Any
    ) -> None:
        base = without_adapters(model)
        original = base.config._attn_implementation
        try:
            base.set_attn_implementation(IMPLEMENTATION)  # the reference model is built with the same
        except (ValueError, NotImplementedError, AttributeError) as error:
            warnings.warn(f"{type(base).__name__} can't use packed attention: {error}", stacklevel=2)
        super().__init__(model, *args, **kwargs)
        if get_model_param_count(self.model, trainable_only=True) == 0:
            raise CMEError(
                "no parameter of the model takes a gradient, so training would change nothing: load an adapter "
                "with PeftModel.from_pretrained(model, adapter, is_trainable=True), or give peft_config"
            )
        self.dense = dense
        reason = self._why_not_packed()
        self.packed = reason is None
        if not self.packed:
            warnings.warn(
                f"TRL's own log-probabilities are used, each prompt once per row: {reason}", stacklevel=2
            )
            for module in self._models():  # whose own code may go by the name of the implementation
                if module.config._attn_implementation == IMPLEMENTATION:
                    module.set_attn_implementation(original)
            return
        for module in self._models():
            add_packed_forward(module)
        add_shared_prefill(self._models()[0])

    def decoding(self) -> dict[str, Any]:
        """The fields of transformers' GenerationConfig with which completions are sampled.

        Where TRL leaves a field open, transformers' `generate` takes the model's own, which is in here too.

        Raises:
            CMEError: there are options that transformers does not have, such as vLLM's own.
        """
        args: Any = self.args
        given = args.generation_kwargs or {}
        unknown = sorted(given.keys() - vars(GenerationConfig()).keys())
        if self.use_vllm and args.vllm_structured_outputs_regex is not None:
            unknown.append("vllm_structured_outputs_regex")
        if unknown:
            raise CMEError(
                f"held-out answers can't be sampled as in training: transformers has no {', '.join(unknown)}. "
                "Leave it out, or the evaluation with --eval-prompts 0"
            )
        if self.use_vllm:
            names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            given = {name: getattr(args, name) for name in names} | given
            config = GenerationConfig(do_sample=True, max_new_tokens=args.max_completion_length, **given)
        else:
            config = copy.deepcopy(self.generation_config)
            if not self.use_transformers_continuous_batching:
                config.update(**self._models()[0].generation_config.to_dict(), defaults_only=True)
        left_out = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
        fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
        return {name: value for name, value in fields.items() if value is not None and name[0] != "_"}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer. Raises CMEError if the model's probabilities become NaN."""
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise CMEError(
                f"the generator's probabilities became NaN after step {self.state.global_step}: start again "
                "with a lower --learning-rate, from the model or from a checkpoint (--model-name-or-path)"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if model is not None or self._has_adapters():  # with FSDP the wrapped model is given
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.load_weights(Path(resume_from_checkpoint))

    def load_weights(self, folder: Path) -> None:
        """Give the model in training the weights in `folder`: those of its adapter if it has one, else all.

        Trainer's own loading passes over weights with other names in files than in the model, such as experts.
        """
        if self._has_adapters():
            self.state.best_model_checkpoint = str(folder)
            self._load_best_model()
            return
        options: Any = self.args
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        saved, _ = load_model(
            str(folder), "model", dtype=model.dtype, device="cpu", trust_remote_code=options.trust_remote_code
        )
        model.load_state_dict(saved.state_dict())

    def _has_adapters(self) -> bool:
        return hasattr(self.accelerator.unwrap_model(self.model), "peft_config")

    def _models(self) -> list[PreTrainedModel]:
        """The policy, and the reference model if there is one, without wrappers and adapters."""
        wrapped = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        return [without_adapters(self.accelerator.unwrap_model(module)) for module in wrapped]

    def _why_not_packed(self) -> str | None:
        args: Any = self.args
        if self.aux_loss_enabled:
            return "the model has an auxiliary router loss"
        if args.cast_lm_head_to_fp32:
            return "cast_lm_head_to_fp32 is set (packed log-probabilities accumulate in float32 without it)"
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            return "DeepSpeed ZeRO-3 keeps the weights in pieces"
        if self._is_vlm:
            return "the model is multimodal"
        peft_config = getattr(self.model, "active_peft_config", None)
        if peft_config is not None and peft_config.is_prompt_learning:
            return "prompt-learning adapters put tokens of their own before the prompt"
        # Only the main process is sure to hold the weights (FSDP may send them later), and all must agree
        reason = [self._model_check() if self.accelerator.is_main_process else None]
        broadcast_object_list(reason)
        return reason[0]

    def _model_check(self) -> str | None:
        base = self._models()[0]
        if base.config._attn_implementation != IMPLEMENTATION:
            return "it can't use packed attention"
        try:
            LMHead.of(base)
            if (rope_type := follows_length(base.config)) is not None:
                return f"its RoPE frequencies (type {rope_type!r}) follow the longest row of a batch"
            return why_not_packed(base, gradients=True)
        except UnsupportedModelError as error:
            return str(error)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,  # [B, L], prompts left-padded and completions right-padded
        attention_mask: Tensor,  # [B, L]
        logits_to_keep: int,  # C, the width of the completions
        batch_size: int | None = None,
        compute_entropy: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and, if asked for, entropies, both [B, C], and the router's loss, which packs lack."""
        if not self.packed:
            result: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, *args, **kwargs
            )
            return result
        rows = batch_size or len(input_ids)
        logprobs: list[Tensor] = []
        entropies: list[Any] = []
        for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True):
            with self.accelerator.autocast():
                logprob, entropy = packed_logprobs(
                    model, ids, mask, logits_to_keep, self.temperature, entropy=compute_entropy
                )
            logprobs.append(logprob)
            entropies.append(entropy)
        return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None, None

    def _generate_and_score_completions(self, inputs: list[Rows]) -> Rows:
        output: Rows = super()._generate_and_score_completions(inputs)
        if self.dense is not None:  # TRL's losses take advantages [B] or [B, C]
            output["advantages"] = token_advantages(
                output["advantages"],
                self.dense.token_rewards,
                output["completion_ids"].shape[1],
                lambda value: self.accelerator.reduce(value, "sum"),
            )
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed at its last step, or where a callback stopped it, a run would train one step more
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)
        else:
            self.log_completions = False  # there are none, and an empty table would replace that of the last step

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # TRL shuffles the rows of a generation batch and cuts it into micro-batches. Where a micro-batch has whole
        # groups, there are fewer prompts to encode.
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.packed or self._buffered_inputs is before:  # no new generation, or an evaluation
            return inputs
        size, batches = self._exchangeable(), self._buffered_inputs
        self._buffered_inputs = [
            batch for start in range(0, len(batches), size) for batch in regroup(batches[start : start + size])
        ]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _exchangeable(self) -> int:
        """The number of consecutive micro-batches that can exchange rows without a change to a step's gradient."""
        args: Any = self.args
        if args.loss_type == "bnpo" or self.top_entropy_quantile < 1 or self._entropy_bonus_enabled:
            return 1  # these weigh each token by the others of its micro-batch
        # An optimizer step has all of that many, or none
        return math.gcd(args.steps_per_generation, args.gradient_accumulation_steps)


def regroup(micro_batches: list[Rows]) -> list[Rows]:
    """The same rows in micro-batches of the same sizes, rows with one prompt side by side.

    Groups are in the order in which their first rows came, so a shuffle before is a shuffle of groups.
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in micro_batches])
    rank: dict[tuple[int, ...], int] = {}
    keys = [rank.setdefault(tuple(ids), len(rank)) for ids in prompts.tolist()]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), device=prompts.device)
    sizes = [len(batch["prompt_ids"]) for batch in micro_batches]
    columns = {}
    for name, first in micro_batches[0].items():
        if isinstance(first, Tensor) and first.dim():
            columns[name] = torch.cat([batch[name] for batch in micro_batches])[order].split(sizes)
        else:  # None, or one value for the whole generation batch
            columns[name] = [first] * len(sizes)
    return [{name: parts[i] for name, parts in columns.items()} for i in range(len(sizes))]


def token_advantages(
    advantages: Tensor,
    token_rewards: Sequence[Sequence[float] | None],
    num_tokens: int,
    total: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """[B, num_tokens]: a response's advantage A [B], and on top of it how far each of its tokens differs from it.

    A_t = A + (r_t - mean_t r) / std(r - mean r), the standard deviation over all tokens of the generation batch,
    so that a response's mean over its tokens is A as in GRPO. A response without token rewards has A everywhere.
    `total` sums over processes.
    """
    differences = torch.zeros(len(advantages), num_tokens, device=advantages.device)  # r_t - mean_t r
    count = 0
    for row, rewards in zip(differences, token_rewards, strict=True):
        if rewards:
            values = torch.tensor(rewards, device=row.device)
            row[: len(values)] = values - values.mean()
            count += len(values)
    squares, tokens = total(torch.stack([differences.square().sum(), torch.tensor(float(count)).to(differences)]))
    return advantages.unsqueeze(1) + differences / ((squares / tokens.clamp(min=1)).sqrt() + 1e-4)
