"""Would the tests notice? Puts faults into the source one at a time and runs the tests of the place.

    python tools/mutate.py --faults tools/faults-2026-11.json --out noticed.jsonl
    python tools/mutate.py --draw 60 --seed 1 --since REV --out drawn.jsonl

A list of faults is JSON: [{"file", "old", "new", "tests"?, "why"?}, ...]; `old` occurs once in the file, `tests` are
those of the place (TESTS) if there are none. --draw makes faults itself, on lines of src/ that differ from REV
(draw_faults.py).

Everything happens in a copy of the checkout in a temporary folder, so that the checkout is never touched. A fault is
*noticed* if a test fails that passes without it, or if the tests do not end within --seconds. Each result is one line
in --out as soon as it is known; what is in there already is not run again. The exit code is 1 if one survived.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from draw_faults import draw, put_in

ROOT = Path(__file__).parents[1]
TESTS = json.loads((Path(__file__).parent / "tests_of_places.json").read_text())
"""Path below src/apportion -> its test files; of several the longest path counts."""


def tests_of(file: str) -> list[str]:
    """The test files that belong to a file of the package."""
    place = file.removeprefix("src/apportion/")
    return TESTS[max((prefix for prefix in TESTS if place.startswith(prefix)), key=len)]


def changed_lines(since: str) -> dict[str, tuple[str, set[int]]]:
    """Text and changed lines of every file of src/ that differs from the revision."""
    diff = subprocess.run(
        ["git", "diff", "-U0", since, "--", "src/**.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    files: dict[str, tuple[str, set[int]]] = {}
    for line in diff.splitlines():
        if path := re.match(r"\+\+\+ b/(.*)", line):
            files[path[1]] = ((ROOT / path[1]).read_text(), set())
        elif hunk := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(hunk[1]), int(hunk[2] or 1)
            files[list(files)[-1]][1].update(range(first, first + count))
    return files


def drawn(n: int, seed: int, since: str) -> list[dict[str, Any]]:
    files = changed_lines(since)
    found = []
    for path, fault in draw(files, n, seed):
        text = files[path][0]
        old, whole = text[fault.start : fault.end], put_in(text, fault)
        found.append({"file": path, **fault._asdict(), "old": old, "text": whole})
    return found


def listed(path: Path) -> list[dict[str, Any]]:
    """The faults of a file, each with the whole text that it makes."""
    found = json.loads(path.read_text())
    for fault in found:
        text = (ROOT / fault["file"]).read_text()
        if text.count(fault["old"]) != 1:
            raise SystemExit(f"{fault['file']} has {text.count(fault['old'])} times, not once: {fault['old']!r}")
        fault |= {"line": text[: text.index(fault["old"])].count("\n") + 1}
        fault |= {"text": text.replace(fault["old"], fault["new"])}
    return found


class Copy:
    """A copy of the checkout in a temporary folder, in which tests run."""

    def __init__(self, folder: Path) -> None:
        self.root, self.passing = folder / "checkout", set[str]()
        ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, self.root, ignore=ignore)

    def run(self, tests: list[str], seconds: float) -> tuple[str, str]:
        """passed, failed or timed out; and the first test that failed."""
        options = ["-n0", "-x", "-m", "", "--no-header", "-p", "no:cacheprovider"]  # slow ones, too
        command = [sys.executable, "-m", "pytest", *options, *tests]
        environment = os.environ | {"PYTHONPATH": str(self.root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            command, cwd=self.root, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timed out", ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        return "failed" if process.returncode else "passed", failed[1] if failed else ""

    def check_clean(self, by: str, tests: list[str], seconds: float) -> None:
        """SystemExit if what noticed the fault would not pass without it."""
        tests = [by] if by else tests
        said = " ".join(tests)
        outcome = "passed" if said in self.passing else self.run(tests, 10 * seconds)[0]
        if outcome != "passed":
            raise SystemExit(f"{said} does not pass without a fault either ({outcome}): mend that first")
        self.passing.add(said)

    def run_with(self, fault: dict[str, Any], tests: list[str], seconds: float) -> tuple[str, str]:
        file = self.root / fault["file"]
        right = file.read_text()
        file.write_text(fault["text"])
        try:
            return self.run(tests, seconds)
        finally:
            file.write_text(right)


def try_all(faults: list[dict[str, Any]], out: Path, seconds: float) -> int:
    """Run every fault that `out` does not know yet; returns how many of all survived."""
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    results = {key_of(result): result for result in known}
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for number, fault in enumerate(faults, 1):
            key, tests = key_of(fault), fault.get("tests") or tests_of(fault["file"])
            if key not in results:
                start = time.monotonic()
                outcome, by = copy.run_with(fault, tests, seconds)
                if outcome != "passed":
                    copy.check_clean(by, tests, seconds)
                result = {name: value for name, value in fault.items() if name != "text"}
                result |= {"outcome": "survived" if outcome == "passed" else "noticed", "by": by or outcome}
                results[key] = result | {"seconds": round(time.monotonic() - start, 1)}
                with out.open("a") as file:
                    file.write(json.dumps(results[key]) + "\n")
            shown = results[key]
            place = f"{fault['file']}:{shown['line']}"
            print(f"{number:3} {shown['outcome']:8} {place}  {shown['old']!r} -> {shown['new']!r}", flush=True)
    survived = sum(results[key_of(fault)]["outcome"] == "survived" for fault in faults)
    print(f"{len(faults) - survived} of {len(faults)} noticed, {survived} survived")
    return survived


def key_of(fault: dict[str, Any]) -> tuple[Any, ...]:
    return fault["file"], fault["line"], fault.get("start"), fault["old"], fault["new"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=Path, help="a list of faults")
    parser.add_argument("--draw", type=int, default=0, help="how many faults to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--since", help="the revision whose difference to the checkout is drawn from")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each fault; continued if there")
    parser.add_argument("--seconds", type=float, default=180, help="time that the tests of one fault may take")
    parser.add_argument("--list", action="store_true", help="only show the faults")
    given = parser.parse_args()
    if bool(given.faults) == bool(given.draw) or bool(given.draw) != bool(given.since):
        parser.error("give either --faults FILE, or --draw N and --since REV")
    found = listed(given.faults) if given.faults else drawn(given.draw, given.seed, given.since)
    if given.list:
        for fault in found:
            print(f"{fault['file']}:{fault['line']}  {fault.get('name', '')}  {fault['old']!r} -> {fault['new']!r}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started it in the background
        signal.signal(number, signal.default_int_handler)
    return int(try_all(found, given.out, given.seconds) > 0)


if __name__ == "__main__":
    sys.exit(main())
