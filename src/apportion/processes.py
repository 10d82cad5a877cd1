"""One run is one process: several that torchrun has started would be as many runs in one folder."""

from __future__ import annotations

import os

SIZE = "WORLD_SIZE"
"""How torchrun, accelerate and deepspeed tell a process how many were started."""


def refuse_several_processes() -> None:
    """ValueError if this is one of several processes that were started together."""
    size = os.environ.get(SIZE, "1")
    if size.isdigit() and int(size) > 1:
        raise ValueError(
            f"{size} processes were started together ({SIZE}), and each would do all of the work, in the same folder: "
            "apportion runs in one process so far, so start one (without torchrun)."
        )
