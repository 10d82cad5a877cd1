"""How much memory there is, and how it is kept."""

from __future__ import annotations

import ctypes
import sys
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


OPTIONS = {-1: 2**31 - 1, -2: 1 << 24, -3: 1 << 30, -8: 1}
"""Of mallopt (malloc.h): M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX."""


def keep_freed() -> bool:
    """From here on, memory that is freed is kept for what comes next, where malloc is that of glibc; False elsewhere.

    Otherwise large tensors are given back to the system when they are freed, and each one that is made anew comes in
    pages of 4 KiB that have to be cleared: rows of a cache in float32 take three times as long, a training step a tenth
    more. The process does not grow by it, it only does not shrink. The command line does this for its own process; a
    program that trains may, too, before it makes threads.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another libc
        return False
    return all(mallopt(option, value) == 1 for option, value in OPTIONS.items())
