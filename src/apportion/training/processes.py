"""One run is one process: several that were started together would be as many runs in one folder."""

from __future__ import annotations

import os

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""How torchrun, mpirun and srun tell a process how many were started."""


def refuse_several_processes() -> None:
    """ValueError if this is one of several processes that were started together."""
    for name in SIZES:
        size = os.environ.get(name, "1")
        if size.isdigit() and int(size) > 1:
            raise ValueError(
                f"{size} processes were started together ({name}), and each would make the whole run in the same "
                "folder: training runs in one process so far, so start one (without torchrun, mpirun or srun -n)."
            )
