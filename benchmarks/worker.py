"""A process that runs one subject and makes one step whenever the parent asks for it over a pipe.

Started as `python -m benchmarks.worker FD` by whichever Python has the library; nothing here needs apportion.
"""

from __future__ import annotations

import sys
from importlib import import_module
from multiprocessing.connection import Connection

import torch

from benchmarks.cases import Shape, Subject, Task
from benchmarks.gate import Gate, Skip, Stop

MODULES = {"torch": "benchmarks.product", "apportion": "benchmarks.ours"}


def main(file_descriptor: int) -> None:
    connection = Connection(file_descriptor)
    told = connection.recv()
    task = Task(**told | {"subject": Subject(**told["subject"]), "shape": Shape(**told["shape"])})
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    try:
        module = MODULES.get(task.subject.library, "benchmarks.peers")
        import_module(module).run(Gate(connection, task))
    except Stop:
        pass
    except Exception as error:
        reason = str(error) if isinstance(error, Skip) else f"{type(error).__name__}: {error}"
        connection.send(("failed", " ".join(reason.split())))
        if not isinstance(error, Skip):
            raise


if __name__ == "__main__":
    main(int(sys.argv[1]))
