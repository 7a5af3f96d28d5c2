"""Tests of the tests: each mistake planted in a copy of the kernels must make the tests named beside it fail.

A process that has imported torch already is forked for each mistake, which saves seconds of imports a time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

# cme_kernels must not be imported here: the forked processes import this module, and then the copy

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parents[1]
TRITON = importlib.util.find_spec("triton") is not None

FAST = ("--disable-plugin-autoload", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception")
"""Most of such a short run would be plugins, rewritten assertions and collected garbage."""

FORWARD = "test_linear_logprob.py::test_statistics"
GRADIENTS = "test_linear_logprob.py::test_gradients"
ONE_OUTPUT = "test_linear_logprob.py::test_gradients_of_one_output"
LARGE = "test_linear_logprob.py::test_large_logits"
FORBIDDEN = "test_linear_logprob.py::test_forbidden_tokens"
TIES = "test_linear_logprob.py::test_ties_go_to_the_lowest_id"
EDGES = "test_linear_logprob.py::test_targets_at_the_edges_of_tiles"
ROUNDED_ONCE = "test_linear_logprob.py::test_the_gradient_of_hidden_is_rounded_once"
DROPPED = "test_linear_logprob.py::test_rows_without_gradient_are_dropped"
FROZEN = "test_linear_logprob.py::test_frozen_head"
MERGED = "test_stats.py::test_merged_slices_are_the_whole[cuts1-0.0]"
MERGED_TIES = "test_stats.py::test_merged_slices_are_the_whole[cuts2-0.0]"
DERIVATIVE = "test_stats.py::test_transform_and_its_derivative"
RANKS = "test_tensor_parallel.py::test_slices_on_ranks[tiled-2-False-dtype0]"


class Mutation(NamedTuple):
    file: str
    text: str
    """Occurs once in the file."""
    replacement: str
    noticed_by: tuple[str, ...]
    """Tests, every one of which must fail."""


MUTATIONS: dict[str, Mutation] = {
    # The algebra of the slices
    "merge: sum not rescaled": Mutation(
        "stats.py",
        "sum_exp=a.sum_exp * r_a",
        "sum_exp=a.sum_exp",
        (MERGED, f"{FORWARD}[tiled-float32-plain]"),
    ),
    "merge: shifted sum not rescaled": Mutation(
        "stats.py",
        "merged.shifted = r_a * _shift(",
        "merged.shifted = _shift(",
        (MERGED, f"{FORWARD}[tiled-float32-plain]"),
    ),
    "merge: squares rescaled once": Mutation(
        "stats.py",
        "a.sum_sq * r_a.square()",
        "a.sum_sq * r_a",
        (MERGED, f"{FORWARD}[tiled-float32-plain]"),
    ),
    "merge: entropy without its shift": Mutation(
        "stats.py",
        "return shifted + sum_exp * delta.clamp(min=-1e4)",
        "return shifted",
        (MERGED, f"{FORWARD}[tiled-float32-plain]"),
    ),
    "merge: ties to the higher id": Mutation(
        "stats.py",
        "torch.where(b.max > a.max,",
        "torch.where(b.max >= a.max,",
        (MERGED_TIES, f"{TIES}[tiled]"),
    ),
    "merge: weighted row not rescaled": Mutation(
        "stats.py",
        "a.weighted_row * r_a.unsqueeze(1)",
        "a.weighted_row",
        (f"{FROZEN}[tiled-float32-plain-logprob]",),
    ),
    "finalize: ignored rows counted": Mutation(
        "stats.py",
        "value.masked_fill_(ignored, 0.0)",
        "value",
        (MERGED, f"{FORWARD}[tiled-float32-plain]"),
    ),
    "finalize: log-probability from lse": Mutation(
        "stats.py",
        "(self.target_logit - self.max) - log_sum",
        "self.target_logit - (self.max + log_sum)",
        ("test_stats.py::test_finalize_far_from_zero_keeps_every_digit",),
    ),
    "derivative: no logit_scale": Mutation(
        "stats.py",
        "slope = self.logit_scale * inverse_temperature",
        "slope = 1.0 * inverse_temperature",
        (f"{DERIVATIVE}[1.0-None]", f"{GRADIENTS}[tiled-float32-logit_scale]"),
    ),
    "derivative: no temperature": Mutation(
        "stats.py",
        "slope = self.logit_scale * inverse_temperature",
        "slope = self.logit_scale",
        (
            f"{DERIVATIVE}[0.6-None]",
            f"{GRADIENTS}[tiled-float32-temperature]",
            f"{GRADIENTS}[tiled-float32-row temperature]",
        ),
    ),
    "derivative: no softcap": Mutation(
        "stats.py",
        "slope = slope * tanh.square_().neg_().add_(1.0)",
        "pass",
        (f"{DERIVATIVE}[1.0-4.0]", f"{GRADIENTS}[tiled-float32-softcap]"),
    ),
    # The torch twin
    "tiled: maximum at least 0": Mutation(
        "tiled.py",
        "z.sub_(maximum.where(maximum > -torch.inf, 0.0).unsqueeze(1))",
        "z.sub_(maximum.clamp_(min=0.0).unsqueeze(1))",
        (f"{LARGE}[tiled--3000.0]",),
    ),
    "tiled: entropy without its shift": Mutation(
        "tiled.py",
        "shifted = z.mul_(p).sum(1)",
        "shifted = z.add_(maximum.unsqueeze(1)).mul_(p).sum(1)",
        (f"{FORWARD}[tiled-float32-plain]",),
    ),
    "tiled: argmax within its tile": Mutation(
        "tiled.py", "argmax = argmax + columns.start", "pass", (f"{FORWARD}[tiled-float32-plain]",)
    ),
    "tiled: target in a tile's first column lost": Mutation(
        "tiled.py", "masked_fill_(~inside,", "masked_fill_(~inside | (local == 0),", (f"{EDGES}[tiled-first]",)
    ),
    "tiled: no entropy in the gradient": Mutation(
        "tiled.py", ".add_(entropy.unsqueeze(1))", "", (f"{ONE_OUTPUT}[tiled-entropy]",)
    ),
    "tiled: gradient of hidden accumulated in its dtype": Mutation(
        "tiled.py",
        "grad_hidden[block].addmm_(dx, weight_tile)",
        "grad_hidden[block] = grad_hidden[block].addmm(dx, weight_tile).to(hidden.dtype)",
        (f"{ROUNDED_ONCE}[tiled]",),
    ),
    "tiled: last columns of the weight gradient missing": Mutation(
        "tiled.py",
        "grad_weight[columns] = grad_weight_tile",
        "grad_weight[columns] = grad_weight_tile if columns.stop < len(weight) else 0.0",
        (f"{GRADIENTS}[tiled-float32-plain]",),
    ),
    "tiled: frozen head, no softcap in the sum": Mutation(
        "tiled.py",
        "p.mul_(slope) @ weight_tile",
        "p @ weight_tile",
        (f"{FROZEN}[tiled-float32-everything-logprob]",),
    ),
    "tiled: frozen head, no softcap at the target": Mutation(
        "tiled.py",
        "partial.target_logit.unsqueeze(1)",
        "torch.zeros_like(partial.target_logit).unsqueeze(1)",
        (f"{FROZEN}[tiled-float32-everything-logprob]",),
    ),
    # What both have in common
    "backward: ignored rows have a gradient": Mutation(
        "custom_op.py",
        "live = x.targets != IGNORE_INDEX",
        "live = torch.ones_like(x.targets, dtype=torch.bool)",
        (f"{GRADIENTS}[tiled-float32-plain]",),
    ),
    "backward: rows without gradient computed": Mutation(
        "custom_op.py",
        "live &= torch.stack([g != 0 for g in upstream if g is not None]).any(0)",
        "pass",
        (f"{DROPPED}[tiled]",),
    ),
    "backward: the mean of the upstream gradients": Mutation(
        "custom_op.py",
        "None if g is None else g[rows] for g in upstream",
        "None if g is None else g[rows].mean().expand(len(rows)) for g in upstream",
        (f"{ONE_OUTPUT}[tiled-logprob]", f"{ONE_OUTPUT}[tiled-entropy]"),
    ),
    # The forward in Triton
    "triton: tail columns counted as exp(0)": Mutation(
        "triton_forward.py",
        'z = tl.where((columns < vocab_size)[None, :], z, -float("inf"))',
        "z = tl.where((columns < vocab_size)[None, :], z, 0.0)",
        (f"{FORWARD}[triton-float32-plain]", f"{LARGE}[triton--3000.0]"),
    ),
    "triton: softcap after the mask": Mutation(
        "triton_forward.py",
        'z = tl.where((columns < vocab_size)[None, :], z, -float("inf"))',
        'z = tl.where((columns < vocab_size)[None, :], z, transform_logits(x - float("inf"), scale, inner))',
        (f"{FORWARD}[triton-float32-softcap]",),
    ),
    "triton: sum not rescaled": Mutation(
        "triton_forward.py",
        "sum_exp * r + tl.sum(p, 1)",
        "sum_exp + tl.sum(p, 1)",
        (f"{FORWARD}[triton-float32-plain]",),
    ),
    "triton: shifted sum not rescaled": Mutation(
        "triton_forward.py",
        "(shifted + sum_exp * delta) * r + tl.sum(p * d, 1)",
        "(shifted + sum_exp * delta) + tl.sum(p * d, 1)",
        (f"{FORWARD}[triton-float32-plain]",),
    ),
    "triton: squares rescaled once": Mutation(
        "triton_forward.py",
        "sum_sq * r * r + tl.sum(p * p, 1)",
        "sum_sq * r + tl.sum(p * p, 1)",
        (f"{FORWARD}[triton-float32-plain]",),
    ),
    "triton: entropy without its shift": Mutation(
        "triton_forward.py",
        "(shifted + sum_exp * delta) * r + tl.sum(p * d, 1)",
        "shifted * r + tl.sum(p * d, 1)",
        (f"{FORWARD}[triton-float32-plain]",),
    ),
    "triton: running maximum from 0": Mutation(
        "triton_forward.py",
        'in_batch = rows < n_rows\n\n    m = tl.full([ROWS], -float("inf"), tl.float32)',
        "in_batch = rows < n_rows\n\n    m = tl.full([ROWS], 0.0, tl.float32)",
        (f"{LARGE}[triton--3000.0]",),
    ),
    "triton: ties to the higher id, from tile to tile": Mutation(
        "triton_forward.py", "tl.where(tile_max > m,", "tl.where(tile_max >= m,", (f"{TIES}[triton]",)
    ),
    "triton: ties to the higher id in a tile": Mutation(
        "triton_forward.py",
        "tl.min(tl.where(z == tile_max[:, None], columns[None, :], 2147483647), 1)",
        "tl.max(tl.where(z == tile_max[:, None], columns[None, :], -1), 1)",
        (f"{TIES}[triton]",),
    ),
    "triton: target in a tile's first column lost": Mutation(
        "triton_forward.py", "(target >= start)", "(target > start)", (f"{EDGES}[triton-first]",)
    ),
    "triton: target in a tile's last column lost": Mutation(
        "triton_forward.py",
        "(target < start + COLUMNS)",
        "(target < start + COLUMNS - 1)",
        (f"{EDGES}[triton-last]",),
    ),
    "triton: target counted from the span's begin": Mutation(
        "triton_forward.py",
        "at_target = columns[None, :] == target[:, None]",
        "at_target = columns[None, :] - first_column == target[:, None]",
        (f"{FORWARD}[triton-float32-plain]",),
    ),
    "triton: spans as wide as the batch asks for": Mutation(
        "triton_forward.py",
        "width = span_tiles(vocab_size, config.columns)",
        "width = span_tiles(vocab_size, config.columns) if n > 1 else 1",
        ("test_linear_logprob.py::test_a_row_does_not_depend_on_its_batch[torch.float16]",),
    ),
    "triton merge: sum not rescaled": Mutation(
        "triton_forward.py",
        "sum_exp * r + tl.sum(s_i * r_i, 0)",
        "sum_exp + tl.sum(s_i * r_i, 0)",
        (f"{FORWARD}[triton-float32-plain]",),
    ),
    "triton merge: shifted sum not rescaled": Mutation(
        "triton_forward.py",
        "(e_i + s_i * delta_i) * r_i",
        "(e_i + s_i * delta_i)",
        (f"{FORWARD}[triton-float32-plain]",),
    ),
    "triton merge: squares rescaled once": Mutation(
        "triton_forward.py", "q_i * r_i * r_i", "q_i * r_i", (f"{FORWARD}[triton-float32-plain]",)
    ),
    "triton merge: entropy without its shift": Mutation(
        "triton_forward.py",
        "(e_i + s_i * delta_i) * r_i",
        "e_i * r_i",
        (f"{FORWARD}[triton-float32-plain]",),
    ),
    "triton merge: running maximum from 0": Mutation(
        "triton_forward.py",
        'in_batch = rows < n_rows\n    m = tl.full([ROWS], -float("inf"), tl.float32)',
        "in_batch = rows < n_rows\n    m = tl.full([ROWS], 0.0, tl.float32)",
        (f"{LARGE}[triton--3000.0]",),
    ),
    "triton merge: ties to the higher id": Mutation(
        "triton_forward.py", "tl.where(chunk_max > m,", "tl.where(chunk_max >= m,", (f"{TIES}[triton]",)
    ),
    # The backward in Triton
    "triton backward: no logit_scale or temperature": Mutation(
        "triton_backward.py",
        "grad *= scale",
        "pass",
        (f"{GRADIENTS}[triton-float32-logit_scale]", f"{GRADIENTS}[triton-float32-temperature]"),
    ),
    "triton backward: no row temperature": Mutation(
        "triton_backward.py", "grad *= scale", "grad *= outer", (f"{GRADIENTS}[triton-float32-row temperature]",)
    ),
    "triton backward: no softcap": Mutation(
        "triton_backward.py",
        "grad *= inner * (1.0 - t * t)",
        "grad *= inner",
        (f"{GRADIENTS}[triton-float32-softcap]",),
    ),
    "triton backward: no entropy in the gradient": Mutation(
        "triton_backward.py",
        "(log_p + tl.load(entropy + rows, in_batch, other=0.0)[:, None])",
        "log_p",
        (f"{ONE_OUTPUT}[triton-entropy]",),
    ),
    "triton backward: rows past the end in the bias gradient": Mutation(
        "triton_backward.py",
        "tl.sum(tl.where(in_batch[:, None], grad, 0.0), 0)",
        "tl.sum(grad, 0)",
        (f"{LARGE}[triton-3000.0]",),
    ),
    "triton backward: targets not relative to the chunk": Mutation(
        "triton_backward.py", "targets - start,", "targets,", (f"{GRADIENTS}[triton-float32-plain]",)
    ),
    "triton backward: gradient of hidden accumulated in its dtype": Mutation(
        "triton_backward.py",
        "add_product(grad_hidden, dx, weight[chunk])",
        "add_product(grad_hidden, dx, weight[chunk]), grad_hidden.copy_(grad_hidden.to(hidden.dtype))",
        (f"{ROUNDED_ONCE}[triton]",),
    ),
    "triton backward: last columns of the weight gradient missing": Mutation(
        "triton_backward.py",
        "torch.mm(dx.T, hidden, out=grad_weight[chunk])",
        "chunk.stop < vocab_size and torch.mm(dx.T, hidden, out=grad_weight[chunk])",
        (f"{GRADIENTS}[triton-float32-plain]",),
    ),
    # A vocabulary over ranks
    "ranks: argmax within its slice": Mutation(
        "tensor_parallel.py", "partial.argmax = partial.argmax + shard.start", "pass", (RANKS,)
    ),
    "ranks: gradient of hidden from one slice": Mutation(
        "tensor_parallel.py", "dist.all_reduce(grad_hidden, group=shard.group)", "pass", (RANKS,)
    ),
}


class Outcome(NamedTuple):
    status: int
    failures: dict[str, str]
    """The type of the exception that ended each failed test."""
    output: str


@pytest.fixture(scope="module")
def forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    modules = ["torch._dynamo", "torch.distributed.tensor", "hypothesis", "pytest"]
    triton = ["triton.tools.tensor_descriptor", "triton.experimental.gluon"]  # the interpreter imports the second
    context.set_forkserver_preload(modules + triton * TRITON)
    return context


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(REPOSITORY / "cme_kernels", tmp_path / "cme_kernels", ignore=ignore))


def run_tests(package: Path, selection: Sequence[str], context: multiprocessing.context.BaseContext) -> Outcome:
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run_tests, package, selection).result(timeout=300)


def _run_tests(package: Path, selection: Sequence[str]) -> Outcome:
    # For this process, and for those that the tests start
    sys.path.insert(0, str(package.parent))
    os.environ["PYTHONPATH"] = str(package.parent)
    os.chdir(package.parent)
    import cme_kernels

    assert Path(cme_kernels.__file__).parent == package
    recorder = Recorder()
    arguments = [f"--rootdir={REPOSITORY}", "--capture=no", *FAST]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main([*arguments, *(f"{TESTS}/{test}" for test in selection)], plugins=[recorder])
    imported = {
        Path(m.__file__).parent for n, m in sys.modules.items() if n.startswith("cme_kernels.") and m.__file__
    }
    assert imported == {package}
    return Outcome(int(status), recorder.failures, output.getvalue())


class Recorder:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[None]) -> None:
        assert call.excinfo is not None
        self.failures[node.nodeid.rpartition("/")[2]] = call.excinfo.type.__name__


def selectable(mutation: Mutation) -> bool:
    return TRITON or not mutation.file.startswith("triton")


def test_the_tests_pass_without_a_mistake(copy: Path, forks: multiprocessing.context.BaseContext) -> None:
    selection = {test: None for m in MUTATIONS.values() if selectable(m) for test in m.noticed_by}
    outcome = run_tests(copy, list(selection), forks)
    assert outcome.status == pytest.ExitCode.OK, outcome.output


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_noticed(copy: Path, forks: multiprocessing.context.BaseContext, name: str) -> None:
    mutation = MUTATIONS[name]
    if not selectable(mutation):
        pytest.skip("no Triton")
    file = copy / mutation.file
    source = file.read_text()
    assert source.count(mutation.text) == 1, f"{mutation.text!r} must occur once in {mutation.file}"
    file.write_text(source.replace(mutation.text, mutation.replacement))
    outcome = run_tests(copy, mutation.noticed_by, forks)
    assert outcome.failures == dict.fromkeys(mutation.noticed_by, "AssertionError"), outcome.output
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
