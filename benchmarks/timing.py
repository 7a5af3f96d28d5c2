"""Contestants that take turns, so that a busy machine or a changing clock hits all of them alike."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass(frozen=True)
class Result:
    """Medians over the rounds.

    Attributes:
        milliseconds: of one call.
        ratio: its time over that of the baseline in the same round.
        extra_mib: most memory in use during a call, minus that before it.
    """

    milliseconds: float
    ratio: float
    extra_mib: float


def race(calls: Mapping[str, Callable[[], Any]], baseline: str, rounds: int) -> dict[str, Result]:
    """Time each call once a round."""
    extra = {name: peak_extra_mib(call) for name, call in calls.items()}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {
        name: Result(
            statistics.median(taken) * 1e3,
            statistics.median(t / b for t, b in zip(taken, times[baseline], strict=True)),
            extra[name],
        )
        for name, taken in times.items()
    }


def seconds(call: Callable[[], Any]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_extra_mib(call: Callable[[], Any], warm_up: bool = True) -> float:
    """Of a second call, or of the first without `warm_up`. On a CPU it is resident memory, on Linux only."""
    if warm_up:
        call()
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):
        # Else the call finds what earlier ones have freed, and seems to need nothing
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return float("nan")
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 2**20


def _resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def report(
    title: str,
    baseline: str,
    results: Mapping[str, Result],
    errors: Mapping[str, float],
    benchmark: Any,
    tokens: int | None = None,
    **facts: Any,
) -> None:
    """Print a table, and put it, `facts` and the versions where --benchmark-json finds them.

    `tokens` is the work of one call, for a column of tokens per second.
    """
    facts = {
        **facts,
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }
    print(f"\n{title}\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    speed = "" if tokens is None else f"{'tokens/s':>11}"
    print(f"{'':<26}{'ms':>10}{'x ' + baseline:>12}{speed}{'extra MiB':>11}{'difference':>12}")
    for name, r in results.items():
        error = f"{errors[name]:.1e}" if name in errors else ""
        speed = "" if tokens is None else f"{tokens / r.milliseconds * 1e3:>11.0f}"
        print(f"{name:<26}{r.milliseconds:>10.1f}{r.ratio:>12.2f}{speed}{r.extra_mib:>11.0f}{error:>12}")
        benchmark.extra_info[name] = {**asdict(r), "difference": errors.get(name)}
    benchmark.extra_info.update({**facts, "baseline": baseline})
