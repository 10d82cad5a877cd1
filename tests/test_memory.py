"""How much memory is free, within the limits of a container, and that what is freed stays at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apportion.memory import free_bytes

SCRIPT = """
import resource, sys, torch
from apportion.memory import keep_freed
if sys.argv[1] == "kept":
    assert keep_freed()
def faults():
    for _ in range(30):
        torch.zeros(3_000_000).add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.zeros(3_000_000).add_(1), torch.zeros(2_000_000).add_(1), torch.zeros(9_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc")
def test_what_is_freed_stays_at_hand() -> None:
    def faults(how: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout
        )

    kept, usual = faults("kept"), faults("usual")
    assert kept < usual / 3, (kept, usual)


def test_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.memory.GROUP", tmp_path)
    whole = free_bytes()
    assert 1e6 < whole < float("inf") or sys.platform != "linux"
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes() > 1e6 or sys.platform != "linux"
    (tmp_path / "memory.max").write_text("51000\n")
    assert free_bytes() == 50_000.0
    (tmp_path / "memory.current").write_text("60000\n")
    assert free_bytes() == 0.0
