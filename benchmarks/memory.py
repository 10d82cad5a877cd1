"""Peak memory of this process since a moment: of the device, or resident (Linux), with stretches left out."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._baseline = 0
        self._highest = 0

    def begin(self) -> None:
        self._reset()
        self._baseline, self._highest = self._peak(), 0

    def peak_bytes(self) -> int:
        """The highest since `begin`, less what there was then."""
        self._highest = max(self._highest, self._peak())
        return max(0, self._highest - self._baseline)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        self._highest = max(self._highest, self._peak())
        try:
            yield
        finally:
            self._reset()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.exists():
            CLEAR.write_text("5")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if STATUS.exists():
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
