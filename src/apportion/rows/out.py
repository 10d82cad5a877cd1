"""The folder into which a cache is written, by any number of processes: what writer.py does there.

Short work on what all share (manifest and journal) is done under the lock of the folder, long work under a lock of the
shard. remote_out.py is the same for a URL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from torch import Tensor

from apportion.disk import naming, write_json, write_tensors
from apportion.durable import sweep, sync_folder
from apportion.locks import LOCK, Lock
from apportion.rows.journal import JOURNAL, Follower, add_line
from apportion.rows.layout import MANIFEST, UNFINISHED
from apportion.rows.manifest import known_shards, read_written, with_lines
from apportion.rows.place import Here
from apportion.rows.shards import sample_sha256_of, sha256_of
from apportion.trust import within

PATIENCE_S = 60
"""How long the lock of the folder, under which nothing takes long, is waited for."""


class Out:
    """A folder that becomes a cache."""

    def __init__(self, place: Path) -> None:
        self.place, self.reading = place, Here(place)
        self._journal = Follower(place)
        self._manifest: dict[str, Any] = {}
        self._written: tuple[int, int] | None = None
        """Which manifest was read, and when it was written."""
        self._made: list[Path] = []

    def begin(self, folders: Iterable[str]) -> None:
        """Make the folder, in which there are to be these."""
        for name in folders:
            within(self.place, name)
        with naming(self.place):
            self._made = [folder for folder in (self.place, *self.place.parents) if not folder.exists()]
            self.place.mkdir(parents=True, exist_ok=True)

    def make_folders(self, names: Iterable[str]) -> None:
        with naming(self.place):
            for name in names:
                within(self.place, name).mkdir(parents=True, exist_ok=True)

    def end(self) -> None:
        """Nothing more is done here."""

    def leave(self) -> None:
        """Remove the folders that were made here, as far as they are empty."""
        for folder in self._made:  # from the inside out
            with suppress(OSError):
                folder.rmdir()

    def lock(self) -> Any:
        """Within the block nobody else writes manifest or journal."""
        return folder_lock(self.place)

    def has_manifest(self) -> bool:
        return (self.place / MANIFEST).is_file()

    def look(self, known: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The shards that are on the disk now; `known` is what was returned before."""
        if not self.has_manifest():
            return dict(known)
        found = (self.place / MANIFEST).stat()
        written = found.st_ino, found.st_mtime_ns
        if written != self._written or self._journal.is_new():
            self._written, self._manifest = written, read_written(self.place)
            self._journal.rewind()
            known = {shard["shard"]: shard for shard in self._manifest["shards"]}
        return with_lines(known, self._journal.lines(), self._manifest, self.place)

    @contextmanager
    def claim(self, number: int) -> Iterator[Lock | None]:
        """Within the block no other process makes this shard; None if one is at it."""
        lock = Lock(self.place / f"{number:05d}{LOCK}", f"shard {number} of the cache {str(self.place)!r}")
        try:
            lock.__enter__()
        except ValueError:
            yield None
            return
        try:
            yield lock
        finally:
            lock.__exit__()

    def is_free(self, number: int) -> bool:
        """Whether nobody makes this shard now."""
        with self.claim(number) as lock:
            return lock is not None

    def others(self) -> bool:
        """Whether somebody makes a shard."""
        sweep(self.place)
        return any(file.name != LOCK for file in self.place.glob(f"*{LOCK}"))

    def save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> str:
        write_tensors(self.place / name, tensors, metadata)
        return name

    def digests(self, files: Sequence[str]) -> dict[str, dict[str, str]]:
        """What the journal says of files that were saved."""
        return {
            "sha256": {file: sha256_of(self.place / file) for file in files},
            "sample_sha256": {file: sample_sha256_of(self.place / file) for file in files},
        }

    def publish(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Put files that were saved where others can read them: here they are."""

    def note(self, line: Mapping[str, Any]) -> None:
        """Write a line of the journal."""
        with self.lock():
            add_line(self.place, line)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_json(self.place / MANIFEST, manifest)
        for folder in (self.place, *(folder.parent for folder in self._made)):
            sync_folder(folder)

    def tidy(self) -> None:
        tidy(self.place)

    def remove(self, folders: Iterable[str]) -> None:
        """What was made here, of which nothing is a whole shard."""
        for file in (MANIFEST, JOURNAL, *self.place.glob("tokens-*.safetensors")):
            with suppress(OSError):
                (self.place / file).unlink(missing_ok=True)
        for name in folders:
            for file in (self.place / name).glob("*.safetensors"):
                with suppress(OSError):
                    file.unlink()
            with suppress(OSError):
                (self.place / name).rmdir()


def tidy(place: Path) -> None:
    """Remove the journal of a cache if the manifest has all of it."""
    manifest = read_written(place)
    if list(known_shards(manifest, place).values()) == manifest["shards"] and manifest["ended"] != UNFINISHED:
        (place / JOURNAL).unlink(missing_ok=True)
        sync_folder(place)


@contextmanager
def folder_lock(place: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Within the block nobody else writes manifest or journal of a cache; it is waited for."""
    lock, deadline = Lock(place / LOCK, f"the cache {str(place)!r}"), monotonic() + patience_s
    while True:
        try:
            lock.__enter__()
            break
        except ValueError:
            if monotonic() > deadline:
                raise
            sleep(0.02)
    try:
        yield
    finally:
        lock.__exit__()
