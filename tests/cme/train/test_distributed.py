"""Packed passes under two processes, each with half of the rows, against one process with all of them."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cme.engine.attention import IMPLEMENTATION
from cme.train.prefill import add_packed_forward, add_shared_prefill, packed_logprobs

WORLD = 2
PROMPT, COMPLETION, PAD = 7, 5, 3
STEPS = 2


def build(tied):
    model = tiny.llama(tie_word_embeddings=tied, attn_implementation=IMPLEMENTATION)
    add_packed_forward(model)
    return model


def make_batch(completions):
    """Ids, mask and a weight for each token's log-probability and entropy. Two groups of four rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, tiny.VOCAB_SIZE, (8, PROMPT + COMPLETION), generator=generator)
    ids[1:4, :PROMPT], ids[5:, :PROMPT] = ids[0, :PROMPT], ids[4, :PROMPT]
    mask = torch.ones_like(ids)
    mask[4:, :3] = 0
    mask[:, PROMPT:] = (torch.arange(COMPLETION) < torch.tensor(completions).unsqueeze(1)).long()
    weights = torch.randn(2, 8, COMPLETION, generator=generator)
    return ids.masked_fill(mask == 0, PAD), mask, weights


BATCHES = {
    "both ranks": (5, 2, 3, 1, 4, 5, 0, 2),
    "rank 1 has nothing": (5, 2, 3, 1, 0, 0, 0, 0),
    "neither has": (0,) * 8,
}
WRAPPERS = ("ddp", "fsdp2", "fsdp2-head-apart")
CASES = [(how, tied, case) for how in WRAPPERS for tied in (False, True) for case in BATCHES]


def loss_of(model, batch, rows):
    ids, mask, (a, b) = (x[..., rows, :] for x in batch)
    logprob, entropy = packed_logprobs(model, ids, mask, COMPLETION, temperature=0.8, entropy=True)
    return (a * logprob).sum() + (b * entropy).sum()


def run_steps(model, batch, rows, scale):
    """Losses and gradients of a few steps of SGD, the optimizer of whose every mistake shows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses, grads = [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch, rows)
        (loss * scale).backward()
        optimizer.step()
        losses.append(loss.item())
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        grads[name.removeprefix("module.")] = grad
    return losses, grads


def wrap(model, how):
    if how == "ddp":
        return DistributedDataParallel(model)
    head = [model.model.norm, model.lm_head]
    if how == "fsdp2-head-apart":  # as accelerate does, so that the head's class changes
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard([model.model.embed_tokens, *head] if tied else head, reshard_after_forward=False)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
    return fully_shard(model)


def compute(rank, folder):
    """One of the processes. The gradients of all ranks are averaged, so the loss is scaled by their number."""
    dist.init_process_group("gloo")
    rows = slice(rank * 4, rank * 4 + 4)
    results = {}
    for how, tied, case in CASES:
        model = wrap(build(tied), how)
        results[how, tied, case] = run_steps(model, make_batch(BATCHES[case]), rows, WORLD)
    model = tiny.llama()
    add_shared_prefill(model)
    wrap(model, "fsdp2")
    results["samples"] = sample(model, rank)
    results["after one token"] = sample(model, rank, first=PROMPT - 1 if rank == 1 else 0)
    torch.save(results, folder / f"{rank}.pt")


def sample(model, rank, first=0):
    """Greedy tokens after prompts, from their token `first` on. Rank 0's are equal and rank 1's are not."""
    ids, mask, _ = make_batch(BATCHES["both ranks"])
    rows = [0, 1, 2, 3] if rank == 0 else [0, 4]
    return model.generate(
        input_ids=ids[rows, first:PROMPT],
        attention_mask=mask[rows, first:PROMPT],
        max_new_tokens=6,
        eos_token_id=None,
        do_sample=False,
    )


def train(rank, folder):
    """One of the processes of a real run, as `accelerate launch` starts them."""
    from datasets import Dataset
    from trl import GRPOConfig

    from cme.train.trainer import PackedGRPOTrainer

    trainer = PackedGRPOTrainer(
        tiny.llama(),
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 17) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=6,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": p} for p in ("What is", "The capital of", "Paris", "Answer")]),
        processing_class=tiny.tokenizer(chat=False),
    )
    assert trainer.packed
    assert trainer.accelerator.num_processes == WORLD
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.save((trainer.state.log_history, weights), folder / f"{rank}.pt")


def launch(folder, job):
    """Run this file in two processes, with the environment that torchrun gives them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = Path(__file__).parents[3]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(root), str(Path(tiny.__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, __file__, job, str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * WORLD, "\n".join(outputs)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    launch(folder, "compute")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(("how", "tied", "case"), CASES)
def test_losses_and_gradients_are_those_of_one_process(how, tied, case, results):
    expected, grads = run_steps(build(tied), make_batch(BATCHES[case]), slice(0, 8), 1)
    found = [rank[how, tied, case] for rank in results]
    sums = [sum(losses) for losses in zip(*(losses for losses, _ in found), strict=True)]
    assert sums == pytest.approx(expected, rel=1e-4)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    assert (norm > 0.1) == any(BATCHES[case])
    for _, rank in found:
        assert rank.keys() == grads.keys()
        for name, grad in grads.items():
            assert (rank[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * norm, name


@pytest.mark.parametrize("rank", range(WORLD))
def test_sharded_sampling_is_that_of_one_process_with_and_without_equal_prompts(rank, results):
    assert torch.equal(results[rank]["samples"], sample(tiny.llama(), rank))


@pytest.mark.parametrize("rank", range(WORLD))
def test_sharded_sampling_where_one_rank_has_prompts_of_one_token(rank, results):
    first = PROMPT - 1 if rank == 1 else 0
    assert torch.equal(results[rank]["after one token"], sample(tiny.llama(), rank, first))


def test_training_in_two_processes_ends_with_equal_weights(tmp_path):
    launch(tmp_path, "train")
    (history, weights), (_, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    steps = [log for log in history if "loss" in log]
    assert len(steps) == 2
    assert all(math.isfinite(log[key]) for log in steps for key in ("loss", "grad_norm", "entropy", "reward"))
    assert all(log["grad_norm"] > 0 for log in steps)
    assert torch.equal(weights, other)
    start = torch.cat([p.detach().flatten() for p in tiny.llama().parameters()])
    assert not torch.equal(weights, start)


if __name__ == "__main__":
    job = {"compute": compute, "train": train}[sys.argv[1]]
    job(int(os.environ["RANK"]), Path(sys.argv[2]))
    dist.destroy_process_group()
