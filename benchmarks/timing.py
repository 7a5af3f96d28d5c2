"""Contestants that take turns, so that a busy machine or a changing clock hits all of them alike."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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


@dataclass
class Samples:
    """One entry a round: seconds of the call, and MiB as `measure` has them."""

    seconds: list[float] = field(default_factory=list)
    extra_mib: list[float] = field(default_factory=list)


def race(
    calls: Mapping[str, Callable[[], Any]], baseline: str, rounds: int, *, warm_up: bool = True
) -> dict[str, Result]:
    """Time each call once a round, after a warm-up.

    Raises:
        RuntimeError: a call that failed.
    """
    if warm_up:
        for call in calls.values():
            call()
    samples, failures = take_turns(calls, rounds)
    if failures:
        raise RuntimeError(f"not measured: {failures}")
    return {
        name: Result(
            statistics.median(own.seconds) * 1e3,
            median_ratio(own.seconds, samples[baseline].seconds),
            statistics.median(own.extra_mib),
        )
        for name, own in samples.items()
    }


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    seed: int = 0,
    after_call: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Measure each call once a round, in an order shuffled anew each round, so that none always follows the same
    other. No warm-up.

    Returns:
        Samples by name, and messages of the calls that raised: these stop at once and have no samples.
    """
    shuffle = random.Random(seed).shuffle
    samples = {name: Samples() for name in calls}
    failures: dict[str, str] = {}
    with _old_objects_kept():
        for _ in range(rounds):
            order = list(samples)
            shuffle(order)
            for name in order:
                try:
                    taken, extra_mib = measure(calls[name])
                except Exception as error:  # a peer may raise anything; the others run on
                    failures[name] = describe(error)
                    del samples[name]
                else:
                    samples[name].seconds.append(taken)
                    samples[name].extra_mib.append(extra_mib)
                after_call(name)
    return samples, failures


@contextlib.contextmanager
def _old_objects_kept() -> Iterator[None]:
    """Collections between calls look at what calls have made, not at all that libraries hold."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def median_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios to the baseline of the same round."""
    return statistics.median(own / base for own, base in zip(seconds, baseline, strict=True))


def describe(error: BaseException) -> str:
    """Type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def measure(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and the most memory that it had in use beyond what was in use before, in MiB.

    On a CPU that is resident memory, and NaN outside Linux.
    """
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        elapsed = seconds(call)
        return elapsed, (torch.cuda.max_memory_allocated() - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):
        # Else the call finds what earlier ones have freed, and seems to need nothing
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return seconds(call), math.nan
    before = proc_bytes("/proc/self/status", "VmRSS")
    elapsed = seconds(call)
    return elapsed, (proc_bytes("/proc/self/status", "VmHWM") - before) / 2**20


def seconds(call: Callable[[], Any]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def proc_bytes(file: str, name: str) -> int:
    """A figure that Linux gives in kB."""
    line = next(x for x in Path(file).read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def report(
    title: str,
    baseline: str,
    results: Mapping[str, Result],
    errors: Mapping[str, float],
    benchmark: Any,
    **facts: Any,
) -> None:
    """Print a table, and put it, `facts` and the versions where --benchmark-json finds them."""
    facts = {
        **facts,
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }
    print(f"\n{title}\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'':<26}{'ms':>10}{'x ' + baseline:>12}{'extra MiB':>11}{'difference':>12}")
    for name, r in results.items():
        error = f"{errors[name]:.1e}" if name in errors else ""
        print(f"{name:<26}{r.milliseconds:>10.1f}{r.ratio:>12.2f}{r.extra_mib:>11.0f}{error:>12}")
        benchmark.extra_info[name] = {**asdict(r), "difference": errors.get(name)}
    benchmark.extra_info.update({**facts, "baseline": baseline})
