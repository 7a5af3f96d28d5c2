"""A vocabulary split over ranks gives what one process gives, in statistics and in gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cme_kernels import linear_logprob
from cme_kernels.custom_op import triton_available

N, H, V = 19, 24, 350
NEEDS_TRITON = pytest.mark.skipif(
    not triton_available() or torch.cuda.is_available(), reason="no Triton, or not its interpreter"
)

RANK = """
import os, sys, torch, torch.distributed as dist
from cme_kernels import linear_logprob
from cme_kernels.stats import OPTIONAL_STATS

rank, world, store, folder, implementation = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
problem = torch.load(f"{folder}/problem.pt")
# Slices of different sizes, in a group that is not all ranks when there are three
members = [0, 2] if problem["subgroup"] else list(range(world))
group = dist.new_group(members)
if rank in members:
    cuts = [0, 130, 170, 350] if len(members) == 3 else [0, 130, 350]
    place = members.index(rank)
    mine = slice(cuts[place], cuts[place + 1])
    hidden = problem["hidden"].requires_grad_()
    weight, bias = (problem[name][mine].clone().requires_grad_() for name in ("weight", "bias"))
    stats = linear_logprob(
        hidden, weight, problem["targets"], bias=bias, stats=OPTIONAL_STATS, implementation=implementation,
        group=group, **problem["options"],
    )
    (stats.logprob * problem["grads"][0] + stats.entropy * problem["grads"][1]).sum().backward()
    values = {name: getattr(stats, name).detach() for name in ("logprob", *OPTIONAL_STATS)}
    grads = {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    torch.save({"stats": values, **grads}, f"{folder}/{place}.pt")
    try:
        linear_logprob(hidden, weight, torch.full_like(problem["targets"], 350), bias=bias, group=group)
    except IndexError as error:
        assert "outside the vocabulary [0, 350)" in str(error), error
    else:
        raise AssertionError("an id beyond the last slice was accepted")
    try:
        linear_logprob(hidden, weight[: 0 if place == 1 else None], problem["targets"], group=group)
    except ValueError as error:
        assert "each needs at least one" in str(error), error
    else:
        raise AssertionError("an empty slice was accepted")
else:
    assert not isinstance(group, dist.ProcessGroup)
    try:
        linear_logprob(problem["hidden"], problem["weight"], problem["targets"], group=group)
    except ValueError as error:
        assert "that this rank is a member of" in str(error), error
dist.barrier()
os._exit(0)  # gloo's threads may abort an orderly exit
"""


@pytest.mark.parametrize(
    ("implementation", "world", "subgroup", "dtype"),
    [
        ("tiled", 2, False, torch.float32),
        ("tiled", 3, False, torch.bfloat16),
        ("tiled", 3, True, torch.float32),
        pytest.param("triton", 2, False, torch.float16, marks=NEEDS_TRITON),
        pytest.param("triton", 3, False, torch.float32, marks=NEEDS_TRITON),
    ],
)
def test_slices_on_ranks(
    tmp_path: Path, implementation: str, world: int, subgroup: bool, dtype: torch.dtype
) -> None:
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((N, H), (V, H), (V,)))
    weight[[300, 140, 10]] = hidden[0] * 9  # equal largest logits in several slices
    bias[[300, 140, 10]] = 0
    targets = torch.randint(V, (N,))
    targets[3] = -100
    problem = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "targets": targets,
        "grads": torch.randn(2, N),
        "options": {"softcap": 12.0, "temperature": torch.rand(N) + 0.5},
        "subgroup": subgroup,
    }
    torch.save(problem, tmp_path / "problem.pt")
    run_ranks(tmp_path, world, implementation)

    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    options = dict(problem["options"])  # type: ignore[call-overload]
    stats = linear_logprob(
        *exact[:2], targets, bias=exact[2], stats=["entropy", "argmax"], implementation="reference", **options
    )
    whole = linear_logprob(hidden, weight, targets, bias=bias, stats=["entropy"], **options)
    (stats.logprob * problem["grads"][0] + stats.entropy * problem["grads"][1]).sum().backward()  # type: ignore[index, operator]
    ranks = [torch.load(path) for path in sorted(tmp_path.glob("[0-9].pt"))]
    assert len(ranks) == (2 if subgroup else world)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 4e-3
    for rank in ranks:
        assert torch.equal(rank["stats"]["argmax"], stats.argmax)
        assert rank["stats"]["argmax"][0] == 10
        torch.testing.assert_close(rank["stats"]["logprob"], whole.logprob, rtol=0, atol=1e-5)
        torch.testing.assert_close(rank["stats"]["entropy"], whole.entropy, rtol=0, atol=1e-5)
        torch.testing.assert_close(rank["hidden"].double(), exact[0].grad, rtol=tolerance, atol=tolerance)
        for name, value in rank["stats"].items():
            assert torch.equal(value, ranks[0]["stats"][name]), name  # the same bits everywhere
        assert torch.equal(rank["hidden"], ranks[0]["hidden"])
    for name, leaf in zip(("weight", "bias"), exact[1:], strict=True):
        together = torch.cat([rank[name] for rank in ranks]).double()
        torch.testing.assert_close(together, leaf.grad, rtol=tolerance, atol=tolerance)


def run_ranks(folder: Path, world: int, implementation: str) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    arguments = [str(world), str(folder / "store"), str(folder), implementation]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *arguments], env=environment)
        for rank in range(world)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
