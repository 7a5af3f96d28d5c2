"""Memory limits of Linux containers, which the system's own figures leave out."""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process's control groups let it still allocate; None without a limit, or without groups.

    Every group above the process counts too. A container may see its own group as the topmost one although the
    process's path goes on above it, so groups that are not there are passed over.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = PurePosixPath(path).relative_to("/")
        free += [_free_in(mount / group, *names) for group in (inside, *inside.parents)]
    return min((f for f in free if f is not None), default=None)


def _free_in(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if most == "max":
        return None
    # Files that were read and are not in use count as used, but give way to allocations
    return max(int(most) - used + int(stat.get(reclaimable, 0)), 0)
