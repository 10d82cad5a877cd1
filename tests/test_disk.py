"""Files and folders that appear whole or not at all."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import apportion as ap
from apportion import disk, durable
from apportion.architectures import files
from apportion.durable import is_unfinished

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    file = tmp_path / "a.txt"
    disk.write_text(file, "old")
    with disk.replacing(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "error",
    [FULL, SafetensorError("I/O error: No space left on device"), RuntimeError("PytorchStreamWriter failed writing")],
    ids=repr,
)
def test_a_full_disk_leaves_the_old_file_and_names_the_file(tmp_path, error):
    file = tmp_path / "a.txt"
    disk.write_text(file, "old")
    with pytest.raises(disk.CannotWrite, match=r"a\.txt cannot be written"), disk.replacing(file) as partial:
        partial.write_text("ne")
        raise error
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), disk.replacing(tmp_path / "a.txt"):
        raise RuntimeError("mine")
    assert not names(tmp_path)


def test_a_link_stays_one_and_a_pipe_too(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other" / "a.json")
    for content in ({"a": 1}, {"a": 2}):
        disk.write_json(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "other" / "a.json").read_text()) == content
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    disk.write_json(tmp_path / "pipe", {"a": 3})
    assert json.loads(os.read(reader, 100)) == {"a": 3} and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_whole(tmp_path, exists):
    out = tmp_path / "deep" / "out"
    if exists:
        out.mkdir(parents=True)
    with disk.whole_folder(out, last=["manifest.json"]) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("x")
        (partial / "manifest.json").write_text("{}")
        assert is_unfinished(partial) and not (out / "manifest.json").exists()
    assert names(out) == ["manifest.json", "sub"] and names(out.parent) == ["out"]


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_of_a_folder_that_failed(tmp_path, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(KeyboardInterrupt), disk.whole_folder(out) as partial:
        (partial / "x").write_text("x")
        raise KeyboardInterrupt
    assert (not names(out)) if exists else not out.exists()
    assert names(tmp_path) == (["out"] if exists else [])


def test_folders_that_were_made_on_the_way_go_too(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), disk.whole_folder(tmp_path / "a" / "b" / "c" / "out"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["a"] and not names(tmp_path / "a")


def test_a_link_and_the_current_folder_are_written_in_place(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    with disk.whole_folder(tmp_path / "link") as partial:
        (partial / "x").write_text("x")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "scratch") == ["x"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with disk.whole_folder(".") as partial:
        (partial / "x").write_text("x")
    assert names(Path.cwd()) == ["x"]


def test_the_file_that_makes_a_folder_valid_is_moved_last(tmp_path, monkeypatch):
    order: list[str] = []
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        order.append(self.name)
        return rename(self, target)

    (tmp_path / "out").mkdir()
    with disk.whole_folder(tmp_path / "out", last=["a.json"]) as partial:
        for name in ("a.json", "b", "c"):
            (partial / name).write_text("")
        monkeypatch.setattr(Path, "rename", noted)
    assert order[1:] == ["b", "c", "a.json"], "the first rename says that it is complete"


@pytest.mark.parametrize("kind", ["file", "folder", "folder in place"])
def test_bytes_are_safe_before_the_name_and_the_name_after_it(tmp_path, monkeypatch, kind):
    """What power cuts show by chance."""
    order: list[str] = []
    sync, rename, replace = durable._sync, Path.rename, Path.replace
    monkeypatch.setattr(durable, "_sync", lambda path, flags: order.append(f"sync {path.name}") or sync(path, flags))
    monkeypatch.setattr(Path, "rename", lambda p, to: order.append(f"rename {Path(to).name}") or rename(p, to))
    monkeypatch.setattr(Path, "replace", lambda p, to: order.append(f"rename {Path(to).name}") or replace(p, to))
    out = tmp_path / "out"
    if kind == "file":
        disk.write_text(out, "x")
        assert order == ["sync out", "rename out", f"sync {tmp_path.name}"]
        return
    if kind == "folder in place":
        out.mkdir()
    with disk.whole_folder(out, last=["last"]) as partial:
        for name in ("x", "last"):
            (partial / name).write_text(name)
    own = f"sync {partial.name}"
    assert set(order[:2]) == {"sync x", "sync last"} and order[2] == own
    assert order[3:] == {
        "folder": ["rename out", f"sync {tmp_path.name}"],
        "folder in place": [
            f"rename {partial.name.replace('unfinished', 'complete')}", "sync out", "rename x", "sync out",
            "rename last", "sync out",
        ],
    }[kind]  # fmt: skip


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    disk.write_json(
        tmp_path / "a.json",
        {
            "a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.0), "d": [np.nan, float("inf")],
            "e": np.arange(2), "f": np.bool_(True), "g": np.float64(1.5), "h": Path("x"), "i": (True, None, "s"),
        },
    )  # fmt: skip
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": 0.5, "b": 3, "c": 2.0, "d": [None, None], "e": [0, 1], "f": True, "g": 1.5, "h": "x",
        "i": [True, None, "s"],
    }  # fmt: skip


def topk(k: int, seed: int) -> ap.SAE:
    return ap.create("topk", d_in=4, d_sae=8, k=k, seed=seed)


@pytest.mark.parametrize("moment", ["weights", "after the weights", "config"])
def test_saving_over_an_sae_replaces_both_files_or_neither(tmp_path, monkeypatch, moment):
    """A process that dies while it saves: what is loaded then is the old SAE or the new one, in both files."""
    old, new = topk(2, 0), topk(3, 1)
    old.save(tmp_path)
    replace = Path.replace

    class Killed(BaseException):
        pass

    def die(self: Path, target: Path) -> Path:
        if moment == "weights" and Path(target).name == files.WEIGHTS:
            raise Killed
        if moment == "config" and Path(target).name == files.CONFIG:
            raise Killed
        done = replace(self, target)
        if moment == "after the weights" and Path(target).name == files.WEIGHTS:
            raise Killed
        return done

    monkeypatch.setattr(Path, "replace", die)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # a process that is gone cleans up nothing
    with pytest.raises(Killed):
        new.save(tmp_path)
    monkeypatch.undo()
    expected = old if moment == "weights" else new
    found = ap.load(tmp_path)
    assert found.k == expected.k and torch.equal(found.W_enc, expected.W_enc)
    new.save(tmp_path)
    assert ap.load(tmp_path).k == 3 and names(tmp_path) == [files.CONFIG, files.WEIGHTS]


def test_a_config_edited_by_hand_is_taken_as_it_is(tmp_path):
    topk(2, 0).save(tmp_path)
    config = disk.read_json(tmp_path / files.CONFIG)
    config["settings"]["hookpoint"] = "model.layers.3"
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    assert ap.load(tmp_path).hookpoint == "model.layers.3"


def test_a_report_is_replaced_as_a_whole(tmp_path, monkeypatch):
    from apportion.evals.report import Report

    html, figures = tmp_path / "report.html", tmp_path / "report.json"
    Report({"k": 1}, "old").write(html, figures)
    with pytest.raises(TypeError):
        Report({"k": 2}, None).write(html, figures)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Report({"k": object()}, "new").write(html, figures)
    assert html.read_text() == "old" and disk.read_json(figures) == {"k": 1}
    assert names(tmp_path) == ["report.html", "report.json"]
