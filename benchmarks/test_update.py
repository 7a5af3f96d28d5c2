"""The passes of one GRPO update over the policy: TRL's own against packs.

    pytest benchmarks/test_update.py -m real_models -s

Losses, backward passes and all that a trainer does around them, for one optimizer step's completions, without
sampling, rewards and the optimizer. TRL shuffles rows before it cuts micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from benchmarks.timing import CUDA, DEVICE, race, report
from cme.demo.models import local_path
from cme.train.trainer import PackedGRPOTrainer, regroup

MODEL = "smollm2-135m-instruct"
PROMPTS, GROUP, PROMPT, COMPLETION = 8, 8, 38, 20
ROUNDS = 3

pytestmark = pytest.mark.real_models


def make_trainer(cls: Any, batch_size: int, folder: Path) -> Any:
    steps = PROMPTS * GROUP // batch_size
    trainer: Any = cls(
        AutoModelForCausalLM.from_pretrained(local_path(MODEL), dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=not CUDA,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            num_generations=GROUP,
            max_completion_length=COMPLETION,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": ""}]),
        processing_class=AutoTokenizer.from_pretrained(local_path(MODEL)),
    )
    trainer.current_gradient_accumulation_steps = steps
    trainer.model.train()
    return trainer


def micro_batches(batch_size: int) -> list[dict[str, Any]]:
    """Shuffled and cut as in TRL's `_prepare_inputs`."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40000, (PROMPTS, PROMPT), generator=generator)
    rows = PROMPTS * GROUP
    batch: dict[str, Any] = {
        "prompt_ids": prompts.repeat_interleave(GROUP, 0),
        "prompt_mask": torch.ones(rows, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(1000, 40000, (rows, COMPLETION), generator=generator),
        "completion_mask": torch.ones(rows, COMPLETION, dtype=torch.long),
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": torch.tensor(float(rows * COMPLETION)),
    }
    torch.manual_seed(0)
    shuffled: Any = shuffle_sequence_dict({name: value.to(DEVICE) for name, value in batch.items()})
    batches: list[dict[str, Any]] = split_tensor_dict(shuffled, rows // batch_size)
    return batches


def update(trainer: Any, batches: list[dict[str, Any]]) -> None:
    trainer.model.zero_grad()
    for batch in batches:
        trainer.compute_loss(trainer.model, batch).backward()


def gradient_difference(theirs: Any, ours: Any) -> float:
    """Norm of the difference of all gradients, over the norm of TRL's."""
    pairs = list(zip(theirs.model.parameters(), ours.model.parameters(), strict=True))
    difference = torch.stack([(a.grad - b.grad).norm() for a, b in pairs]).norm()
    return (difference / torch.stack([a.grad.norm() for a, _ in pairs]).norm()).item()


@pytest.mark.parametrize("batch_size", [8, 64])
def test_update(benchmark: Any, batch_size: int, tmp_path: Path) -> None:
    theirs = make_trainer(GRPOTrainer, batch_size, tmp_path / "theirs")
    ours = make_trainer(PackedGRPOTrainer, batch_size, tmp_path / "ours")
    assert ours.packed
    batches = micro_batches(batch_size)
    grouped = regroup(batches)
    calls: dict[str, Callable[[], None]] = {
        "TRL": partial(update, theirs, batches),
        "cme": partial(update, ours, grouped),
    }
    results = race(calls, "TRL", ROUNDS)
    benchmark.pedantic(calls["cme"], rounds=1)
    errors = {"cme": gradient_difference(theirs, ours)}
    report(
        "one update", "TRL", results, errors, benchmark,
        model=MODEL, dtype="torch.float32", prompts=PROMPTS, group=GROUP, prompt=PROMPT, completion=COMPLETION,
        per_device_train_batch_size=batch_size,
    )  # fmt: skip
    assert errors["cme"] <= 1e-4
