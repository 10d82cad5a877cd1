"""Output that nobody takes: one line on stderr, exit code 2, no traceback of Python's own at exit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import assert_one_line, shell
from trials import trials

import apportion as ap

WAYS = {
    "a full device": ("$A info {sae} > /dev/full; echo $? >&2", "No space left on device"),
    "unbuffered to a full device": ("PYTHONUNBUFFERED=1 $A info {sae} > /dev/full; echo $? >&2", "No space left"),
    "closed": ("$A info {sae} >&-; echo $? >&2", "The output is closed"),
    "closed before its end": ("{{ $A info {sae}; echo $? >&2; }} | true", "closed it before its end"),
    "help to a full device": ("$A train --help > /dev/full; echo $? >&2", "No space left on device"),
    "help to nobody": ("{{ $A --help; echo $? >&2; }} | true", "closed it before its end"),
    "long work and closed": ("$A train {cache} --out {out} >&-; echo $? >&2", "The output is closed"),
    "a recipe": ("{python} -m apportion.recipes.compare --help > /dev/full; echo $? >&2", "No space left"),
    "a mistake and closed": ("$A info {sae}/nowhere >&-; echo $? >&2", "The output is closed"),
}


@pytest.mark.fault("closed output")
@pytest.mark.parametrize("name", trials(list(WAYS), 1))
def test_output_that_nobody_takes(name: str, tmp_path: Path) -> None:
    ap.create("topk", d_in=4, d_sae=8, k=2).save(tmp_path / "sae")
    places = {"sae": tmp_path / "sae", "out": tmp_path / "run", "cache": tmp_path / "acts", "python": sys.executable}
    script, expected = WAYS[name]
    done = shell(script.format(**places))
    *said, code = done.stderr.splitlines()
    assert code == "2", done.stderr
    assert_one_line("\n".join(said).replace("compare: ", "apportion: "), expected)
    assert len(said) == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.fault("closed output")
@pytest.mark.parametrize("where", trials(["2>&-", "2>/dev/full", ">&- 2>&-"], 1))
def test_with_nowhere_to_complain_the_exit_code_is_left(where: str, tmp_path: Path) -> None:
    assert shell(f"$A info {tmp_path}/nowhere {where}").returncode == 2


@pytest.mark.fault("closed output")
@pytest.mark.parametrize("where", trials(["2>&-", "2>/dev/full"], 0))
def test_training_does_not_need_stderr(where: str, tmp_path: Path) -> None:
    options = "--hookpoint model.layers.1 --tokens 2k --context-tokens 32 --k 4 --d-sae 64 --batch-tokens 256 --lr 3e-3"
    assert shell(f"$A train embedded {options} --out {tmp_path}/run {where}").returncode in (0, 3)
    assert ap.load(tmp_path / "run").hookpoint == "model.layers.1"


@pytest.mark.few(1)
@pytest.mark.fault("closed output")
@pytest.mark.parametrize("redirect", trials(["> {log}", ">> {log}", "| cat >> {log}"], 1))
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1"])
def test_what_goes_to_the_output_joins_what_is_there(name: str, redirect: str, tmp_path: Path) -> None:
    (log := tmp_path / "log").write_text("before\n")
    inode = log.stat().st_ino
    write = (
        f"from apportion.disk import write_json; from pathlib import Path; print(1); write_json(Path('{name}'), {{}})"
    )
    shell(f'{sys.executable} -c "{write}; print(2)" {redirect.format(log=log)}')
    assert log.read_text() == "before\n" * (">>" in redirect) + "1\n{}\n2\n" and log.stat().st_ino == inode
