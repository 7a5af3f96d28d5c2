"""Hardware, and versions of all that took part: what results hold for."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cme_kernels
from benchmarks.peers import Peer


def hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": "cuda",
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "power_limit_w": _power_limit(),
        }
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": "cpu",
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory_bytes / 2**30, 1),
    }


def versions(peers: Iterable[Peer]) -> dict[str, str | None]:
    """By package; None where it is not installed."""
    packages = ("triton", *(peer.package for peer in peers if peer.package not in ("cme", "torch")))
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # names the build, "+cu130" say, which the distribution's version may not
        "cuda": torch.version.cuda or torch.version.hip,
        **{name: _version(name) for name in packages},
        "cme_kernels": source_version(Path(cme_kernels.__file__).parent),
    }


def source_version(folder: Path) -> str:
    """A hash of the sources: results hold for the kernels that were measured, whatever release they carry."""
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:12]


def slug(facts: dict[str, Any]) -> str:
    """A folder's name for the hardware."""
    name = facts["name"] if facts["device"] == "cuda" else f"{facts['name']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Module.*?(\d+\.\d+(?:\.\d+)?)", path.read_text()) if path.exists() else None
    return found[1] if found else None


def _power_limit() -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetEnforcedPowerLimit(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1000
    except Exception:  # no pynvml, or a driver that does not tell: the figure is missing then
        return None
