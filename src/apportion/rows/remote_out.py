"""The URL to which a cache is written, by any number of processes: what writer.py does there.

    s3://bucket/acts/journal/00003.json    the line of a shard, put there behind its files, until the manifest has it
    s3://bucket/acts/claims/00003.json     who makes a shard now

A shard is made in a folder here and put there file by file, each whole; the line comes last, so a shard is there with
all its files or not at all. It stays here as a copy (copies.py), as long as there is room.

There are no locks in an object store. Who begins a shard says so in `claims`, renews that every minute, and leaves
alone what others have claimed and not given up; who finds that he was taken over commits nothing. These are a few
small requests a shard, for which hardly ever two make the same one. If they do, because they claimed it at the same
moment, both write the same bytes, as long as they ask for the same tokens on processors of one kind.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any
from uuid import uuid4

from torch import Tensor

from apportion.disk import json_text, naming, write_tensors
from apportion.durable import place_in
from apportion.locks import STALE_S, TOUCHED_EVERY_S, is_gone, this_process
from apportion.rows.journal import line_text
from apportion.rows.layout import JOURNALS, MANIFEST
from apportion.rows.manifest import read_written, with_lines
from apportion.rows.place import There, key_of
from apportion.rows.retries import Refused
from apportion.rows.shards import sample_sha256_of, sha256_of

log = logging.getLogger(__name__)

CLAIMS, OF_MANIFEST = "claims", "manifest"
PROBE = ".apportion.probe"
OURS = {CLAIMS, PROBE}
"""What may lie at a URL that counts as empty."""
PATIENCE_S = 60
LOOK_EVERY_S = 0.2


class RemoteOut:
    """A URL that becomes a cache."""

    def __init__(self, url: str) -> None:
        self.place, self.reading = url, There(url)
        self.remote = self.reading.remote
        self._own: dict[int, dict[str, Any]] = {}
        """Lines of shards that this process has put there."""
        self._lines: dict[str, tuple[str, list[dict[str, Any]]]] = {}
        """Of each object of the journal what tells it from a newer one, and the lines in it."""
        self._manifest: tuple[str, dict[str, Any]] = ("", {})
        self._staging: Any = None
        self._folder = Path()

    def begin(self, folders: Iterable[str]) -> None:
        """Make the folder here in which a shard is made."""
        copies = self.reading.copies
        with naming(copies.folder):
            copies.folder.mkdir(parents=True, exist_ok=True)
        self._staging = place_in(copies.folder, "collecting")
        self._folder = self._staging.__enter__()

    def make_folders(self, names: Iterable[str]) -> None:
        for name in names:
            (self._folder / name).mkdir(parents=True, exist_ok=True)

    def end(self) -> None:
        if self._staging is not None:
            self._staging.__exit__(None, None, None)
            self._staging = None

    def leave(self) -> None:
        """There are no folders in an object store."""

    @contextmanager
    def lock(self) -> Iterator[Claim]:
        """Within the block nobody else writes the manifest, as far as claims go; whoever does is waited for."""
        patience = monotonic() + PATIENCE_S
        while True:
            with self._claimed(OF_MANIFEST) as claim:
                if claim is not None:
                    yield claim
                    return
            if monotonic() > patience:
                patience = float("inf")
                log.warning("%s: somebody else is writing its manifest, and is waited for", self.place)
            sleep(LOOK_EVERY_S)

    def has_manifest(self) -> bool:
        return self.reading.manifest() is not None

    def look(self, known: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The shards that are there now. The journal moves into the manifest, and is looked at before and after it.

        Whoever moves it may take a line away that came in the same moment; its process puts it there again."""
        while True:
            names = self.remote.names(JOURNALS)
            for name, said in names.items():
                if self._lines.get(name, ("",))[0] != said:
                    self._lines[name] = said, [*self.reading.line(name)]
            written = self.remote.version(MANIFEST)
            if not written:
                return dict(known)
            if written != self._manifest[0]:
                self._manifest = written, read_written(self.reading)
            if self.remote.names(JOURNALS) == names:
                break
        self._lines = {name: self._lines[name] for name in names}
        manifest = self._manifest[1]
        lines = [line for _, found in self._lines.values() for line in found]
        of_manifest = {shard["shard"]: shard["contexts"] for shard in manifest["shards"]}
        for number, line in self._own.items():
            if f"{number:05d}.json" not in self._lines and of_manifest.get(number, 0) < line["contexts"]:
                self.note(line)
                lines.append(line)
        return with_lines({shard["shard"]: shard for shard in manifest["shards"]}, lines, manifest, self.place)

    @contextmanager
    def claim(self, number: int) -> Iterator[Claim | None]:
        """Within the block no other process makes this shard, unless it claimed it at the same moment; None if one is
        at it."""
        with self._claimed(f"{number:05d}") as claim:
            yield claim

    def is_free(self, number: int) -> bool:
        """Whether nobody makes this shard now."""
        return _is_free(self._said(f"{CLAIMS}/{number:05d}.json"))

    def others(self) -> bool:
        """Whether somebody makes a shard."""
        names = self.remote.names(CLAIMS).keys() - {f"{OF_MANIFEST}.json"}
        return any(not _is_free(self._said(f"{CLAIMS}/{name}")) for name in names)

    @contextmanager
    def _claimed(self, what: str) -> Iterator[Claim | None]:
        claim = Claim(self, f"{CLAIMS}/{what}.json")
        if not _is_free(self._said(claim.name)) or not claim.take():
            yield None
            return
        try:
            yield claim
        finally:
            claim.give_up()

    def _said(self, name: str) -> dict[str, Any]:
        """Who claims something; empty if nobody does."""
        with suppress(FileNotFoundError, ValueError):
            found = json.loads(self.remote.read(name, 0, 1 << 16))
            return found if isinstance(found, dict) else {}
        return {}

    def save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> str:
        write_tensors(self._folder / name, tensors, metadata)
        return name

    def digests(self, files: Sequence[str]) -> dict[str, dict[str, str]]:
        """What the journal says of files that were saved."""
        return {
            "sha256": {file: sha256_of(self._folder / file) for file in files},
            "sample_sha256": {file: sample_sha256_of(self._folder / file) for file in files},
        }

    def publish(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Put files that were saved where others can read them; here they stay as copies."""
        self.remote.together(lambda name: self.remote.put(name, self._folder / name), digests["sha256"])
        for name, digest in digests["sha256"].items():
            self.reading.copies.add(key_of(digest), self._folder / name)
            (self._folder / name).unlink(missing_ok=True)  # if it does not fit the copies

    def note(self, line: Mapping[str, Any]) -> None:
        """Write the line of a shard."""
        self._own[line["shard"]] = dict(line)
        self.remote.write(f"{JOURNALS}/{line['shard']:05d}.json", line_text(line).encode())

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        self.remote.write(MANIFEST, json_text(manifest).encode())

    def tidy(self) -> None:
        """Remove of the journal what the manifest has."""
        there = read_written(self.reading)["shards"]
        for name in self.remote.names(JOURNALS):
            lines = [*self.reading.line(name)]
            if lines and all(line in there for line in lines):
                with suppress(Refused):  # whoever may write need not be allowed to delete
                    self.remote.remove(f"{JOURNALS}/{name}")

    def remove(self, folders: Iterable[str]) -> None:
        """What was put there, of which nothing is a whole shard."""
        for folder in ("", JOURNALS, *folders):
            for name in self.remote.names(folder):
                if name == MANIFEST or name.endswith(".safetensors") or folder == JOURNALS:
                    self.remote.remove(f"{folder}/{name}" if folder else name)


class Claim:
    """What says that this process makes something, renewed every minute."""

    def __init__(self, out: RemoteOut, name: str) -> None:
        self.name, self._out, self._mine = name, out, uuid4().hex
        self._done = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> bool:
        """False if somebody else took it at the same moment."""
        self._write()
        if self._out._said(self.name).get("claim") != self._mine:
            return False
        HELD.add(self._mine)
        self._renewing.start()
        return True

    def give_up(self) -> None:
        HELD.discard(self._mine)
        self._done.set()
        self._renewing.join()
        with suppress(OSError, ValueError):
            if self._out._said(self.name).get("claim") == self._mine:
                self._out.remote.remove(self.name)

    def check(self) -> None:
        """ValueError if somebody took it over: this process seemed to be gone, as it or the network stood still."""
        if self._out._said(self.name).get("claim") != self._mine:
            raise ValueError(
                f"{self._out.place}/{self.name} was taken over by another process while this one stood still: stopping."
            )

    def _write(self) -> None:
        self._out.remote.write(self.name, json.dumps({**this_process(), "claim": self._mine, "at": time()}).encode())

    def _renew(self) -> None:
        while not self._done.wait(TOUCHED_EVERY_S):
            with suppress(OSError, ValueError):
                self._write()


HELD: set[str] = set()
"""Claims of this process; others that say that they are its own were left when the store was away."""


def _is_free(said: Mapping[str, Any]) -> bool:
    at, me = said.get("at"), this_process()
    if said.get("claim") not in HELD and all(said.get(name) == me[name] for name in ("host", "boot", "pid", "start")):
        return True
    silent_s = time() - at if isinstance(at, float) else STALE_S + 1
    return not said or silent_s > STALE_S or is_gone(dict(said), silent_s, unlocked=False)


def check_url(url: str) -> None:
    """ValueError if something else lies at a URL, or nothing can be written there."""
    remote = There(url).remote
    if others := remote.names(empty=False).keys() - OURS:
        raise ValueError(f"{url!r} exists already (it has {sorted(others)[0]}): choose another URL or delete it first")
    check_may_put(url)


def check_may_put(url: str) -> None:
    """ValueError if nothing can be written at a URL."""
    remote = There(url).remote
    remote.write(PROBE, b"")
    with suppress(ValueError):  # whoever may write need not be allowed to delete
        remote.remove(PROBE)
