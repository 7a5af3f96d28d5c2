"""The contestants: ways to the log-probability of each row's target under softmax(hidden @ weight.T).

Each is called as its own users would call it, with its defaults. None need be exact: errors are measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import describe
from cme_kernels import linear_logprob

LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, H], weight [V, H], targets [N]) -> log-probabilities [N], or, where a peer can backpropagate only
one gradient for all rows, their sum."""

FORWARD, BACKWARD, FROZEN = "forward", "forward+backward", "frozen-head"
PASSES = (FORWARD, BACKWARD, FROZEN)
MATMULS = {FORWARD: 1, BACKWARD: 3, FROZEN: 2}
"""Products of the size of hidden @ weight.T that a pass needs: the logits, and one for each gradient. What is
computed twice is not counted, so that recomputing looks as slow as it is."""

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Peer:
    """
    Attributes:
        name: on the command line and in results.
        package: the distribution that it comes from.
        load: imports it. An ImportError or RuntimeError says why it cannot run here.
        logits: where logits are while it runs, and rounded to what.
        in_memory: whether they pass through memory, all or in chunks (else registers or cache).
        devices, dtypes, passes: what it takes.
        capability: the one compute capability that it is written for, on CUDA.
        slow: devices where it takes so many times what others do that it is measured only when named.
        per_token: whether it backpropagates any gradient per token; else its backward is that of the plain sum.
        note: what else a reader must know.
    """

    name: str
    package: str
    load: Callable[[], LogProb]
    logits: str
    in_memory: bool
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    passes: tuple[str, ...] = PASSES
    capability: tuple[int, int] | None = None
    slow: tuple[str, ...] = ()
    per_token: bool = True
    note: str = ""

    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def slow_on(self, device: torch.device) -> bool:
        return device.type in self.slow

    def obstacle(self, device: torch.device, dtype: torch.dtype, pass_name: str | None = None) -> str | None:
        """Why it cannot run (this pass) here, or None if it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if dtype not in self.dtypes:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)} only"
        if pass_name is not None and pass_name not in self.passes:
            return f"has no {pass_name} pass"
        if self.capability and device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability != self.capability:
                return "needs compute capability {}.{}, this is {}.{}".format(*self.capability, *capability)
        loaded = _load(self)
        return loaded if isinstance(loaded, str) else None

    def function(self) -> LogProb:
        """Only if there is no obstacle."""
        loaded = _load(self)
        if isinstance(loaded, str):
            raise RuntimeError(f"{self.name} cannot run here: {loaded}")
        return loaded


@cache
def _load(peer: Peer) -> LogProb | str:
    try:
        return peer.load()
    except (ImportError, RuntimeError) as error:
        missing = f"{peer.package} is not installed: " if peer.version() is None else ""
        return f"{missing}{describe(error)}"


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits in the dtype of the inputs, their log-softmax in float32: what most trainers do."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def load_compiled() -> LogProb:
    # One code object serves every shape, dtype and pass; past the default limit dynamo would run it uncompiled
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 256
    compiled: LogProb = torch.compile(eager, dynamic=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled(
        torch.ones(2, 3, device=device), torch.ones(5, 3, device=device), torch.zeros(2, device=device).long()
    )
    return compiled


def load_core(chunked: bool) -> LogProb:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(
            f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions; it came with 2.13"
        )
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def core(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return core


def load_trl() -> LogProb:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]

    return chunked


def load_liger_flce() -> LogProb:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def flce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")

    return flce


def load_liger_flce_sm90() -> LogProb:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    def flce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -liger_fused_linear_cross_entropy_sm90(hidden, weight, targets, reduction="sum")

    return flce


def load_liger_flsce() -> LogProb:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        raise RuntimeError("Liger itself takes liger-flsce-sm90 on compute capability 9.0")
    return _liger_flsce()


def _liger_flsce() -> LogProb:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return lambda hidden, weight, targets: (
        -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
    )


def load_liger_flsce_sm90() -> LogProb:
    import liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90  # noqa: F401

    # Else it waits for the device in every call, to look at the targets
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")
    return _liger_flsce()


def load_liger_flsce_cutile() -> LogProb:
    from liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return lambda hidden, weight, targets: (
        -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
    )


def load_cce(implementation: str) -> LogProb:
    from cut_cross_entropy import linear_cross_entropy

    def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=implementation)

    return cce


def load_quack() -> LogProb:
    from quack.epilogue.library import lse_target_epi
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def quack(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return -chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")
        # What the function above calls without gradients, before it sums
        out = lse_target_epi(hidden, weight.mT, store_d=False, target=targets, tuned=False)
        return out["target_logit"] - out["lse"]

    return quack


def load_verl() -> LogProb:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, 1.0, "none")[0]


def cme(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets).logprob


def cme_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets, stats=("entropy",)).logprob


FULL = "full matrix, input dtype"
CHUNKS = "chunks of rows, input dtype"
FUSED = "never in memory, float32"

PEERS = (
    Peer("eager", "torch", lambda: eager, FULL, True),
    Peer("eager-compiled", "torch", load_compiled, FULL, True, note="torch.compile of eager"),
    Peer(
        "torch-core", "torch", lambda: load_core(chunked=False), FULL, True,
        note="torch.nn.functional.linear_cross_entropy by default",
    ),
    Peer(
        "torch-core-chunked", "torch", lambda: load_core(chunked=True), CHUNKS, True, slow=("cpu",),
        note="the same with LinearCrossEntropyOptions(); on a CPU it reads the weight once per few rows",
    ),
    Peer("trl", "trl", load_trl, "tiles of 4096 x 32768, input dtype", True, note="chunked_logprob"),
    Peer(
        "liger-flce", "liger-kernel", load_liger_flce, CHUNKS, True, devices=("cuda",),
        note="Triton; its backward recomputes; sums the weight's gradient in the weight's dtype",
    ),
    Peer(
        "liger-flce-sm90", "liger-kernel", load_liger_flce_sm90, FULL, True, devices=("cuda",),
        dtypes=(torch.bfloat16,), passes=(BACKWARD,), capability=(9, 0), per_token=False,
        note="CuTe DSL; gradients in the forward; N a multiple of 128 and V of 256",
    ),
    Peer(
        "liger-flsce", "liger-kernel", load_liger_flsce, "chunks of 512 rows, input dtype", True,
        note="torch fallback of the scaled cross entropy; computes the entropy too",
    ),
    Peer(
        "liger-flsce-sm90", "liger-kernel", load_liger_flsce_sm90, "never in memory, float16", False,
        devices=("cuda",), dtypes=(torch.bfloat16,), capability=(9, 0),
        note="CuTe DSL; sums the weight's gradient in bfloat16",
    ),
    Peer(
        "liger-flsce-cutile", "liger-kernel", load_liger_flsce_cutile, CHUNKS, True, devices=("cuda",),
        note="cuTile",
    ),
    Peer(
        "cce", "cut-cross-entropy", lambda: load_cce("cce"), FUSED, False, devices=("cuda",), dtypes=HALF_DTYPES,
        note="Triton; its backward skips probabilities below eps/32",
    ),
    Peer("cce-compiled", "cut-cross-entropy", lambda: load_cce("torch_compile"), FULL, True, note="torch.compile"),
    Peer(
        "quack", "quack-kernels", load_quack, "never in memory; with gradients scaled bfloat16 chunks", False,
        devices=("cuda",), dtypes=HALF_DTYPES, per_token=False, note="CuTe DSL; gradients in the forward",
    ),
    Peer(
        "verl", "verl", load_verl, FUSED, False, devices=("cuda",), dtypes=HALF_DTYPES,
        note="Triton; computes the entropy too; H a multiple of 128",
    ),
    Peer("cme", "cme", lambda: cme, FUSED, False),
    Peer("cme-entropy", "cme", lambda: cme_entropy, FUSED, False, note="with the entropy of each row"),
)  # fmt: skip


def parse_peers(names: list[str] | None, device: torch.device) -> list[Peer]:
    """Peers by name, in the registry's order; by default all but those that are slow on the device.

    Raises:
        ValueError: an unknown name.
    """
    unknown = set(names or ()) - {peer.name for peer in PEERS}
    if unknown:
        raise ValueError(f"unknown peers {sorted(unknown)}; choose from {', '.join(p.name for p in PEERS)}")
    if names is None:
        return [peer for peer in PEERS if not peer.slow_on(device)]
    return [peer for peer in PEERS if peer.name in names]
