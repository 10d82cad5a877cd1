"""Runs commands of apportion in this process, which has mounts and limits of its own. Requests are lines of JSON on
stdin, answers lines on stdout; see `Confined` in test_disks.py, which starts it."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import resource
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

import apportion as ap
from apportion.cli import main

torch.set_num_threads(1)


@contextmanager
def limited(limits: dict[str, int]):
    """Within the block the soft limits are as given; AS is counted from what is in use."""
    before = {}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        before[kind] = resource.getrlimit(kind)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if name == "AS" else 0
        resource.setrlimit(kind, (used + value, before[kind][1]))
    try:
        yield
    finally:
        for kind, old in before.items():
            resource.setrlimit(kind, old)


@contextmanager
def after_steps(steps: int, script: str):
    """Within the block a script runs when so many training steps have been made."""
    step = ap.Trainer.step
    made = 0

    def counting(self: ap.Trainer, batch: Any) -> Any:
        nonlocal made
        made += 1
        if made == steps:
            subprocess.run(["sh", "-c", script], check=True)
        return step(self, batch)

    ap.Trainer.step = counting
    try:
        yield
    finally:
        ap.Trainer.step = step


def save(source: str, folder: str) -> int:
    """As a command: save an SAE."""
    from apportion.answers import answered

    return answered("apportion", lambda words: ap.load(source).save(folder), [])


def command(argv: list[str], limits: dict[str, int], then: list[Any] | None) -> dict[str, Any]:
    said, log = io.StringIO(), io.StringIO()
    logging.getLogger("apportion").handlers[:] = [logging.StreamHandler(log)]
    logging.getLogger("apportion").propagate = False
    with redirect_stderr(said), redirect_stdout(io.StringIO()), limited(limits), after_steps(*(then or (0, ""))):
        code = save(*argv[1:]) if argv[0] == "save" else main(argv)
    return {"code": code, "said": said.getvalue()}


def files(folder: str) -> dict[str, str]:
    at = Path(folder)
    return {
        str(p.relative_to(at)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(at.rglob("*")) if p.is_file()
    }


for line in sys.stdin:
    request = json.loads(line)
    if "script" in request:
        done = subprocess.run(["sh", "-c", request["script"]], capture_output=True, text=True, check=False)
        answer: Any = {"code": done.returncode, "said": done.stderr}
    elif "files" in request:
        answer = files(request["files"])
    else:
        answer = command(request["argv"], request.get("limits", {}), request.get("then"))
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
