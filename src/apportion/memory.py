"""How much memory there is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container, or a job of a cluster, may take."""
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""What may be taken, and what is, in version 2 and 1."""


def free_bytes() -> float:
    """Of this machine's memory what is free for this process; infinite where nobody says so."""
    free = float("inf")
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), free)
    for most, used in LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number
            free = min(free, float(int((GROUP / most).read_text()) - int((GROUP / used).read_text())))
    return max(0.0, free)
