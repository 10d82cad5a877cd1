"""Caches at URLs: what is read and written is what a folder has, whatever the network does."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_store import Answer, FaultyStore, changed, clear, contents, copy_to, every, failing
from test_gaps import interrupted
from test_store import OUT, tiny

from apportion import cli
from apportion.architectures import create
from apportion.language.model import load_model
from apportion.locks import this_process
from apportion.rows import ActivationStore, CacheSource, PairStore, open_stores, place, remote_out, retries
from apportion.rows import writer as writer_module
from apportion.rows.copies import FOLDER_VARIABLE, SIZE_VARIABLE, Copies
from apportion.rows.layout import sealed
from apportion.rows.manifest import read_manifest
from apportion.rows.mend import merge, repair
from apportion.rows.remote import Remote, size_of_tensors
from apportion.rows.retries import Refused, Retries, Unreachable
from apportion.rows.writer import cache_at
from apportion.training import TrainConfig, Trainer
from apportion.urls import in_full, is_there, url_of

URL = "faulty://bucket/acts"
TWO = ["model.layers.0", OUT]
WORDS = "the cat sat on mat and looked at dog by sea she read a book about ships".split()  # noqa: SIM905
TEXT = [" ".join(random.Random(0).choices(WORDS, k=900))]
"""Of which no two shards are equal: equal ones are one copy."""


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 40)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "LONGEST_WAIT_S", 0.002)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "copies"))
    monkeypatch.delenv(SIZE_VARIABLE, raising=False)
    clear()
    yield
    FaultyStore.fault = None
    clear()


@pytest.fixture(scope="module")
def folder(lm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten shards at one hookpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "SHARD_ROWS", 40)
        tiny(lm, out := tmp_path_factory.mktemp("local") / "acts", text=TEXT)
    return out


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def without_times(files: dict[str, bytes]) -> dict[str, Any]:
    manifest = json.loads(files["manifest.json"])
    return files | {"manifest.json": manifest | dict.fromkeys(("seconds", "tokens_per_s", "manifest_sha256"))}


def sleep_until(there: Any) -> None:
    deadline = time.monotonic() + 10
    while not there() and time.monotonic() < deadline:
        time.sleep(0.01)


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "copies").glob("*.safetensors"))


class TestPlaces:
    def test_what_a_url_is(self, tmp_path: Path) -> None:
        assert url_of("s3://bucket/acts/") == "s3://bucket/acts" == url_of(Path("s3://bucket/acts"))
        assert url_of(Path("file:///srv/acts")) == "file:///srv/acts" and url_of("memory://acts") == "memory://acts"
        for path in ("acts", "/srv/acts", "~/acts", "c:/acts", Path("C:/acts"), Path("a/s3:/b"), "a:b"):
            assert url_of(path) is None, path
        assert is_there("s3://bucket/acts") and is_there(tmp_path) and not is_there(tmp_path / "none")
        assert in_full("s3://bucket/acts") == "s3://bucket/acts" and in_full(tmp_path / ".") == str(tmp_path.resolve())

    @pytest.mark.parametrize("scheme", ["faulty", "memory", "file"])
    def test_reading_is_like_reading_a_folder(self, scheme: str, folder: Path, tmp_path: Path) -> None:
        url = f"file://{folder}" if scheme == "file" else f"{scheme}://bucket/acts"
        if scheme != "file":
            copy_to(url, folder)
        here, there = ActivationStore(folder), ActivationStore(url)
        assert there.is_remote and not here.is_remote and there.part_rows == here.part_rows == [32] * 12 + [16]
        assert there.folder == url == there.describe().folder
        assert torch.equal(here.mask, there.mask) and torch.equal(here.tokens, there.tokens)
        assert torch.equal(here.contexts, there.contexts) and torch.equal(here.positions, there.positions)
        rows = torch.randperm(here.rows)
        assert torch.equal(here.gather(rows), there.gather(rows))
        assert torch.equal(here.batch(rows[:50]).x, there.batch(rows[:50]).x)
        assert here.content_sha256 == there.content_sha256 and here.tokens_sha256 == there.tokens_sha256
        there.verify()

    def test_batches_are_those_of_a_folder(self, folder: Path) -> None:
        copy_to(URL, folder)
        for window in (None, 3):
            sources = [CacheSource(ActivationStore(path), seed=3, window=window) for path in (folder, URL)]
            for one, other, _ in zip(*(source.batches(50) for source in sources), range(9), strict=False):
                assert torch.equal(one.x, other.x) and torch.equal(one.tokens, other.tokens)
            for one, other in zip(*(source.held_out(30) for source in sources), strict=True):
                assert torch.equal(one.x, other.x)
            assert torch.equal(sources[0].sample(20).x, sources[1].sample(20).x)
        assert CacheSource(ActivationStore(folder)).window is None and CacheSource(ActivationStore(URL)).window == 13

    def test_training_begins_when_its_first_window_is_here(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("apportion.training.trainer.FETCHED_ROWS", 1)
        monkeypatch.setattr("apportion.training.trainer.FIT_INPUT_ROWS", 20)
        monkeypatch.setattr("apportion.rows.windows.MIXED_PARTS", 2)
        monkeypatch.setattr("apportion.rows.windows.MIXED_ROWS", 1)
        copy_to(URL, folder)
        source = CacheSource(ActivationStore(URL), held_out_share=0.5)
        assert source.window == 2 and source.is_fetched
        sae = create("topk", d_in=source.d_in, d_sae=16, k=2)
        trainer = Trainer(sae, TrainConfig(total_tokens=32, batch_tokens=4))
        with failing(every(Exception, before=0)) as requests:
            trainer._sane_sample(source)
            batches = source.stored_batches(4)
            next(batches)
            sleep_until(lambda: len(requests) >= 4)
            next(batches)
            assert len(requests) == 4, requests
            batches.close()

    @pytest.mark.parametrize("dtype", ["int8", "float32"])
    def test_other_numbers_and_several_hookpoints(self, dtype: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
        from apportion.language.collect import collect

        collect(*lm, TWO, TEXT, tokens=400, out=tmp_path / "acts", context_tokens=8, batch_contexts=2, dtype=dtype)
        copy_to(URL, tmp_path / "acts")
        rows = torch.arange(400).flip(0)
        here, there = PairStore(*open_stores(tmp_path / "acts")), PairStore(*open_stores(URL))
        assert torch.equal(here.batch(rows).x, there.batch(rows).x)
        assert torch.equal(here.batch(rows).target, there.batch(rows).target)
        assert there.describe().folder == URL and there.describe().content_sha256 == here.describe().content_sha256

    def test_a_store_is_sent_as_where_it_lies(self, folder: Path) -> None:
        copy_to(URL, folder)
        store = ActivationStore(URL, copies=Copies(folder.parent / "mine", 1))
        again = pickle.loads(pickle.dumps(store))
        assert torch.equal(again.gather(torch.arange(9)), store.gather(torch.arange(9)))
        assert again.place.copies.folder == folder.parent / "mine" and again.place.copies.gigabytes == 1


class TestWhatIsFetched:
    def test_opening_fetches_labels_and_norms_alone(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(place, "HEADER_BYTES", 8)  # headers are longer than what is fetched of a file at first
        copy_to(URL, folder)
        with failing(every(Exception, before=0)) as requests:
            store = ActivationStore(URL)
            assert torch.equal(store.mask, ActivationStore(folder).mask)
            of_acts = sum(size for what, path, size in requests if what == "read" and f"/{OUT}/" in path)
        assert of_acts < sum(file.stat().st_size for file in (folder / OUT).iterdir()) - 400 * store.d_in

    def test_shards_are_fetched_once_and_by_whole_ones(self, folder: Path, tmp_path: Path) -> None:
        copy_to(URL, folder)
        store = ActivationStore(URL)
        with failing(every(Exception, before=0)) as requests:
            store.fetch([2, 5, 5])
            assert sorted(path[-17:] for _, path, _ in requests) == ["00002.safetensors", "00005.safetensors"]
            store.gather(torch.arange(64, 90))
            store.fetch([5])
            assert len(requests) == 2
            store.gather(torch.tensor([0]))
            assert len(requests) == 3
            again = ActivationStore(URL)
            again.gather(torch.arange(64, 90))
            labels = [path for _, path, _ in requests[3:] if path.endswith(".safetensors")]
            assert not labels, "all that it needs is here"

    def test_shards_are_fetched_at_the_same_time(self, folder: Path) -> None:
        copy_to(URL, folder)
        store, together = ActivationStore(URL), threading.Barrier(3)

        def fault(what: str, path: str, number: int) -> None:
            together.wait(20)

        with failing(fault):
            store.fetch([0, 1, 2])

    def test_those_used_longest_ago_leave(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        copy_to(URL, folder)
        monkeypatch.setattr(place, "HEADER_BYTES", 4096)
        size = (folder / OUT / "00000.safetensors").stat().st_size
        store = ActivationStore(URL, copies=Copies(tmp_path / "mine", 6 * size / 1e9))
        rows = torch.arange(store.rows)
        assert torch.equal(store.gather(rows), ActivationStore(folder).gather(rows)), "one after the other"
        assert sum(file.stat().st_size for file in (tmp_path / "mine").iterdir()) <= 6 * size
        assert store._fetched is not None and len(store._fetched._mapped) < 13
        with pytest.raises(ValueError, match=r"13 shards of .* --cache-gb more"):
            store.fetch(range(13))
        with pytest.raises(ValueError, match=r"does not fit the copies.*--cache-gb more"):
            ActivationStore(URL, copies=Copies(tmp_path / "small", 1e-6))

    def test_room(self, tmp_path: Path) -> None:
        kept, names = Copies(tmp_path, 1e-6), {key: f"{key * 64}.safetensors" for key in "abcde"}  # 1000 bytes
        (tmp_path / "model.safetensors").write_bytes(b"x" * 5000)
        os.utime(tmp_path / "model.safetensors", (0, 0))

        def made(key: str) -> None:
            kept.use(names[key], 300, lambda to: to.write_bytes(b"x" * 300) and None, lambda file: None)

        def there() -> set[str]:
            return {file.name[0] for file in tmp_path.glob("*.safetensors")} - {"m"}

        for number, key in enumerate("abc"):
            made(key)
            os.utime(tmp_path / names[key], (number, number))
        made("a")  # is used again
        made("d")
        assert there() == {"a", "c", "d"}
        with kept.holding([names["c"]]):
            os.utime(tmp_path / names["c"], (0, 0))
            os.utime(tmp_path / names["a"], (5, 5))
            made("e")
        assert there() == {"c", "d", "e"}
        assert (tmp_path / "model.safetensors").exists(), "somebody's own"
        for bad in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="give --cache-gb more than 0"):
                Copies(tmp_path, bad)

    def test_what_comes_at_the_same_time_counts(self, tmp_path: Path) -> None:
        kept, begun, go_on = Copies(tmp_path, 1e-6), threading.Barrier(4), threading.Event()
        for key in "789":  # used before
            kept.use(f"{key * 64}.safetensors", 300, lambda to: to.write_bytes(b"x" * 300) and None, lambda file: None)

        def make(to: Path) -> None:
            begun.wait(20)
            go_on.wait(20)
            to.write_bytes(b"x" * 300)

        keys = [f"{key * 64}.safetensors" for key in "abc"]
        threads = [threading.Thread(target=kept.use, args=(key, 300, make, lambda file: None)) for key in keys]
        for thread in threads:
            thread.start()
        begun.wait(20)
        assert not list(tmp_path.glob("*.safetensors")), "there is room for three"
        go_on.set()
        for thread in threads:
            thread.join()

    def test_copies_that_left_are_let_go_of_by_all(self, folder: Path, tmp_path: Path) -> None:
        copy_to(URL, folder)
        copies = Copies(tmp_path / "mine", 1)
        stores = [ActivationStore(URL, copies=copies) for _ in range(2)]
        for store in stores:
            store.fetch(range(4))
        copies._limit, copies._room = 1, 0
        copies._make_room(1)
        assert all(store._fetched is not None and not store._fetched._mapped for store in stores)

    def test_what_the_variables_say(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SIZE_VARIABLE, "much")
        with pytest.raises(ValueError, match=r"APPORTION_CACHE_GB=much is no number of GB"):
            Copies()
        monkeypatch.setenv(SIZE_VARIABLE, "3")
        assert Copies().limit == 3e9 and Copies().folder == tmp_path / "copies"
        monkeypatch.delenv(SIZE_VARIABLE)
        monkeypatch.delenv(FOLDER_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        assert Copies().folder == tmp_path / "home" / "apportion" and 0 < Copies().limit <= 20e9

    def test_two_that_want_the_same_fetch_it_once(self, tmp_path: Path) -> None:
        kept, made = [Copies(tmp_path, 1), Copies(tmp_path, 1)], []

        def make(to: Path) -> None:
            made.append(to)
            to.write_bytes(b"who")
            time.sleep(0.3)
            to.write_bytes(b"whole")

        def use(one: Copies) -> None:
            assert one.use("a.safetensors", 5, make, lambda file: file.read_bytes()) == b"whole"

        threads = [threading.Thread(target=use, args=(one,)) for one in kept]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert not (tmp_path / "a.safetensors").exists(), "a half of it is never seen"
        for thread in threads:
            thread.join()
        assert len(made) == 1

    def test_a_copy_that_leaves_or_was_damaged_is_fetched_anew(self, folder: Path, tmp_path: Path) -> None:
        copy_to(URL, folder)
        store = ActivationStore(URL)
        store.fetch([1])
        (copy,) = [f for f in copies(tmp_path) if f.read_bytes() == (folder / OUT / "00001.safetensors").read_bytes()]
        copy.unlink()
        store.fetch([0])  # lets shard 1 go
        store.fetch([1])
        assert copy.exists()
        for file in copies(tmp_path):
            file.write_bytes(b"\0" * file.stat().st_size)
        again, rows = ActivationStore(URL), torch.arange(400)
        assert torch.equal(again.gather(rows), ActivationStore(folder).gather(rows))

    def test_another_cache_at_the_same_url(self, lm: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
        copy_to(URL, folder)
        ActivationStore(URL).gather(torch.arange(400))
        clear()
        tiny(lm, tmp_path / "other", text=[TEXT[0][::-1]])
        copy_to(URL, tmp_path / "other")
        rows = torch.arange(200)
        assert torch.equal(ActivationStore(URL).gather(rows), ActivationStore(tmp_path / "other").gather(rows))


ERRORS = {
    "500": lambda: Answer(500),
    "503": lambda: Answer(503),
    "429": lambda: Answer(429),
    "SlowDown": lambda: OSError(16, "Please reduce your request rate."),
    "time-out": TimeoutError,
    "lost": lambda: ConnectionResetError(104, "Connection reset by peer"),
}


class TestFaults:
    @pytest.mark.parametrize("kind", ERRORS)
    def test_what_passes_is_asked_again(self, kind: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        copy_to(URL, folder)
        with failing(lambda what, path, number: (_ for _ in ()).throw(ERRORS[kind]()) if number % 2 == 0 else None):
            store = ActivationStore(URL)
            assert torch.equal(store.gather(torch.arange(400)), ActivationStore(folder).gather(torch.arange(400)))
        assert sum("does not answer as it should" in record.message for record in caplog.records) == 1

    def test_a_store_that_is_away_for_a_while(self, folder: Path) -> None:
        copy_to(URL, folder)
        store = ActivationStore(URL)
        with failing(every(lambda: ConnectionError("no route"), before=retries.TRIES - 1)):
            store.fetch([3])

    def test_one_that_stays_away(self, folder: Path, tmp_path: Path) -> None:
        copy_to(URL, folder)
        store = ActivationStore(URL)
        with failing(every(lambda: ConnectionError("no route"))) as requests:
            with pytest.raises(
                Unreachable, match=rf"{URL}/{OUT}/00003.* tried 9 times .*no route.*Check the connection"
            ):
                store.fetch([3])
            assert len(requests) == retries.TRIES
        with failing(every(lambda: ConnectionError("no route"), name="00002.safetensors")), pytest.raises(Unreachable):
            store.gather(torch.arange(400))
        store.fetch([3])

    @pytest.mark.parametrize("how", ["cut", "a byte", "empty"])
    def test_what_comes_changed_is_fetched_again(self, how: str, folder: Path) -> None:
        copy_to(URL, folder)
        change = {
            "cut": lambda content: content[:-7],
            "a byte": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
            "empty": lambda content: b"",
        }[how]
        store = ActivationStore(URL)
        with failing(changed(change, f"{OUT}/00004.safetensors")):
            store.fetch([4])
        damaged = pytest.raises(ValueError, match=rf"cache '{URL}' is damaged .*00005.* what comes from there")
        with failing(changed(change, f"{OUT}/00005.safetensors", times=99)), damaged:
            store.fetch([5])
        assert torch.equal(store.gather(torch.arange(400)), ActivationStore(folder).gather(torch.arange(400)))
        clear()
        copy_to(URL, folder)
        with failing(changed(change, "tokens-00004.safetensors")):
            ActivationStore(URL, copies=Copies(folder.parent / how.replace(" ", "-"), 1))

    def test_norms_that_came_changed_are_found(self, folder: Path) -> None:
        copy_to(URL, folder)

        def change(content: bytes) -> bytes:
            at = 8 + int.from_bytes(content[:8], "little")
            return content[: at + 8] + bytes([content[at + 8] ^ 1]) + content[at + 9 :]

        with failing(changed(change, f"{OUT}/00004.safetensors")):
            store = ActivationStore(URL)
            with pytest.raises(ValueError, match=r"norms of .*00004.* were damaged on their way: run this again"):
                store.fetch([4])
        store = ActivationStore(URL)
        store.fetch([4])

    def test_what_is_missing_or_damaged_there(self, folder: Path) -> None:
        copy_to(URL, folder)
        store = ActivationStore(URL)
        fs = Remote(URL)
        fs.remove(f"{OUT}/00001.safetensors")
        fs.write(f"{OUT}/00002.safetensors", b"garbage")
        with pytest.raises(ValueError, match=r"is damaged .*00001\.safetensors is missing"):
            store.fetch([1])
        with pytest.raises(ValueError, match=rf"{OUT}/00001.safetensors, {OUT}/00002.safetensors changed"):
            store.verify()
        with pytest.raises(ValueError, match=r"is damaged .*00001\.safetensors is missing"):
            ActivationStore(URL, copies=Copies(folder.parent / "anew", 1))

    @pytest.mark.parametrize(
        "error", [lambda: Answer(403), lambda: PermissionError(13, "Access Denied"), lambda: Answer(401)]
    )
    def test_what_is_refused_is_said_at_once(self, error: Any, folder: Path) -> None:
        copy_to(URL, folder)
        with failing(every(error)) as requests:
            with pytest.raises(Refused, match=rf"{URL}/manifest.json may not be read.*AWS_PROFILE"):
                ActivationStore(URL)
            assert len(requests) == 1
            with pytest.raises(Refused, match=r"faulty://none/acts"):
                cache_at("faulty://none/acts")

    def test_other_answers(self, folder: Path) -> None:
        copy_to(URL, folder)
        with failing(every(lambda: Answer(404))), pytest.raises(ValueError, match=r"is no activation cache"):
            ActivationStore(URL)
        with failing(every(lambda: Answer(301))), pytest.raises(Refused, match=r"301.*Check the URL, its region"):
            ActivationStore(URL)
        with failing(every(lambda: Answer(501))) as requests:
            with pytest.raises(Refused, match="501"):
                ActivationStore(URL)
            assert len(requests) == 1
        with failing(every(lambda: KeyError("ours"))), pytest.raises(KeyError):
            ActivationStore(URL)
        with failing(every(lambda: OSError(28, "No space left on device"))) as requests:
            with pytest.raises(OSError, match="No space"):
                ActivationStore(URL)
            assert len(requests) == 1

    def test_waits_grow_and_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked, waits = Retries("s3://bucket"), []
        monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.5)
        monkeypatch.setattr(retries, "LONGEST_WAIT_S", 30.0)
        monkeypatch.setattr(retries, "LOOK_EVERY_S", 100.0)
        clock = [0.0]

        def wait(seconds: float) -> None:
            waits.append(seconds)
            clock[0] += seconds

        monkeypatch.setattr(retries, "monotonic", lambda: clock[0])
        monkeypatch.setattr(retries, "sleep", wait)

        def lost() -> None:
            raise ConnectionError

        for _ in range(2):
            with pytest.raises(Unreachable):
                asked.call(lost)
        assert len(waits) == 16 and waits[:8] != waits[8:]
        longest = [min(30, 0.5 * 2**i) for i in range(8)] * 2
        assert all(most / 2 <= s <= most * 1.001 for s, most in zip(waits, longest, strict=True))

    def test_nobody_goes_on_waiting_for_what_is_not_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(retries, "FIRST_WAIT_S", 30.0)
        monkeypatch.setattr(retries, "LONGEST_WAIT_S", 30.0)
        ending, asked = threading.Event(), Retries("s3://bucket")

        def lost() -> None:
            threading.Timer(0.2, ending.set).start()
            raise ConnectionError

        began = time.monotonic()
        with pytest.raises(Unreachable, match="tried 2 times"):
            retries.wanted_until(ending, asked.call)(lost)
        assert time.monotonic() - began < 10 and retries.is_wanted()

    def test_the_manifest_is_believed_as_little_as_one_here(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        for change, match in (
            ({"format_version": 9}, "format version 9"),
            ({"rows": -1}, "no possible number"),
        ):
            copy_to(URL, folder)
            Remote(URL).write("manifest.json", json.dumps(sealed(manifest | change)).encode())
            with pytest.raises(ValueError, match=match):
                ActivationStore(URL)
        shards = [dict(shard) for shard in manifest["shards"]]
        shards[0]["sha256"] = dict.fromkeys(shards[0]["sha256"], "../../x")
        Remote(URL).write("manifest.json", json.dumps(sealed(manifest | {"shards": shards})).encode())
        with pytest.raises(ValueError, match="no sha256"):
            ActivationStore(URL)

    def test_a_server_without_ranges(self, folder: Path) -> None:
        """It sends the whole file whatever is asked for."""
        copy_to(URL, folder)
        fs = Remote(URL)
        whole = (folder / OUT / "00000.safetensors").read_bytes()
        fs._fs = type("Whole", (), {"cat_file": lambda self, path, **how: whole})()
        assert fs.read(f"{OUT}/00000.safetensors", 10, 20) == whole[10:30]
        assert size_of_tensors(whole) == len(whole) and size_of_tensors(b"garbage") == size_of_tensors(b"") == 0

    def test_a_file_in_pieces(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from apportion.rows import remote

        copy_to(URL, folder)
        name = f"{OUT}/00000.safetensors"
        monkeypatch.setattr(remote, "CHUNK_BYTES", 2000)
        Remote(URL).fetch(name, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == (folder / name).read_bytes()


class TestCollecting:
    @pytest.mark.parametrize("scheme", ["faulty", "memory"])
    def test_bytes_are_those_of_a_folder(self, scheme: str, folder: Path, lm: tuple[Any, Any], tmp_path: Path) -> None:
        tiny(lm, url := f"{scheme}://bucket/acts", text=TEXT)
        assert without_times(contents(url)) == without_times(on_disk(folder))
        assert len(copies(tmp_path)) > 20 and not [*(tmp_path / "copies").glob("*unfinished*")]
        with pytest.raises(ValueError, match=r"exists already.*append"):
            tiny(lm, url, text=TEXT)

    def test_to_files_that_appear_whole(self, folder: Path, lm: tuple[Any, Any], tmp_path: Path) -> None:
        tiny(lm, f"file://{tmp_path}/acts", text=TEXT)
        assert without_times(on_disk(tmp_path / "acts")) == without_times(on_disk(folder))

    @pytest.mark.parametrize("at", [2, 5, 9])
    def test_going_on(self, at: int, folder: Path, lm: tuple[Any, Any]) -> None:
        said = interrupted(lm, URL, at, text=TEXT)
        assert "are kept in faulty://bucket/acts" in said
        assert ActivationStore(URL).rows == read_manifest(URL)["rows"] > 0
        tiny(lm, URL, text=TEXT)
        assert without_times(contents(URL)) == without_times(on_disk(folder))

    def test_a_stop_before_anything_leaves_nothing(self, lm: tuple[Any, Any]) -> None:
        assert interrupted(lm, URL, 1, text=TEXT) == f"stopped after 0 contexts; nothing is left at {URL}"
        assert not contents(URL)

    def test_appending(self, folder: Path, lm: tuple[Any, Any], tmp_path: Path) -> None:
        tiny(lm, URL, tokens=200, text=TEXT)
        for file in copies(tmp_path):  # as on another machine
            file.unlink()
        tiny(lm, URL, text=TEXT, append=True)
        assert without_times(contents(URL)) == without_times(on_disk(folder))
        with pytest.raises(ValueError, match=r"begun with context_tokens = 8, and not 16"):
            tiny(lm, URL, text=TEXT, append=True, context_tokens=16)

    @pytest.mark.parametrize("kind", ERRORS)
    def test_through_faults(self, kind: str, folder: Path, lm: tuple[Any, Any]) -> None:
        with failing(lambda what, path, number: (_ for _ in ()).throw(ERRORS[kind]()) if number % 3 else None):
            tiny(lm, URL, text=TEXT)
        assert without_times(contents(URL)) == without_times(on_disk(folder))

    @pytest.mark.parametrize("first", [5, 20, 41, 42, 43, 44, 45, 60, 90, 130])
    def test_a_store_that_goes_away_for_good(self, first: int, folder: Path, lm: tuple[Any, Any]) -> None:
        """Whatever was the last request, what is there is whole, and the next collection goes on."""
        with failing(every(lambda: ConnectionError("gone"), first)), pytest.raises(Unreachable, match="run this again"):
            tiny(lm, URL, text=TEXT)
        if "manifest.json" in contents(URL) and read_manifest(URL)["rows"]:
            ActivationStore(URL).verify()
        tiny(lm, URL, text=TEXT)
        found = {name: content for name, content in contents(URL).items() if not re.search("part-|claims", name)}
        assert without_times(found) == without_times(on_disk(folder))

    def test_a_reader_meanwhile(self, lm: tuple[Any, Any]) -> None:
        seen = []

        def fault(what: str, path: str, number: int) -> None:
            if what == "write" and "journal/00003.json" in path:
                FaultyStore.fault = None
                seen.append((read_manifest(URL)["ended"], ActivationStore(URL).rows))
                ActivationStore(URL).verify()

        with failing(fault):
            tiny(lm, URL, text=TEXT)
        assert seen == [("unfinished", 96)]

    def test_others_shards_are_left_to_them(self, folder: Path, lm: tuple[Any, Any], monkeypatch: Any) -> None:
        from apportion.language import collect as collect_module

        monkeypatch.setattr(collect_module, "LOOK_EVERY_S", 0.05)
        assert interrupted(lm, URL, 9, text=TEXT)
        other = remote_out.RemoteOut(URL)
        with other.claim(5) as claim:
            assert claim is not None and not other.is_free(5) and other.is_free(6) and other.others()
            with other.claim(5) as second:
                assert second is None
            collecting = threading.Thread(target=tiny, args=(lm, URL), kwargs={"text": TEXT})
            collecting.start()
            while f"{OUT}/00012.safetensors" not in contents(URL):
                time.sleep(0.02)
            assert f"{OUT}/00005.safetensors" not in contents(URL), "which it waits for"
        collecting.join(30)
        assert without_times(contents(URL)) == without_times(on_disk(folder))

    def test_claims_that_are_given_up(self, lm: tuple[Any, Any]) -> None:
        out, free = remote_out.RemoteOut(URL), {"at": time.time(), "host": "another", "boot": "another"}
        for said, is_free in (
            (free, False),
            (free | {"at": time.time() - 700}, True),
            ({}, True),
            ({"at": "now"}, True),
        ):
            out.remote.write("claims/00005.json", json.dumps(said).encode())
            assert out.is_free(5) == is_free, said
        out.remote.write("claims/00005.json", b"garbage")
        assert out.is_free(5)

    def test_a_claim_is_renewed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote_out, "TOUCHED_EVERY_S", 0.02)
        out = remote_out.RemoteOut(URL)
        with out.claim(5):
            first = out._said("claims/00005.json")["at"]
            time.sleep(0.2)
            assert out._said("claims/00005.json")["at"] > first
        assert not contents(URL)

    def test_what_is_there_already(self, lm: tuple[Any, Any], folder: Path) -> None:
        Remote("faulty://bucket/mine").write("notes.txt", b"mine")
        with pytest.raises(ValueError, match=r"'faulty://bucket/mine' exists already \(it has notes\.txt\)"):
            tiny(lm, "faulty://bucket/mine")
        without_bucket = failing(every(lambda: FileNotFoundError("The specified bucket does not exist")))
        with without_bucket, pytest.raises(ValueError, match=r"cannot be written .*make its bucket first"):
            cache_at(URL)
        assert cache_at(URL) is None and not contents(URL)

    def test_what_only_folders_can(self, folder: Path, tmp_path: Path) -> None:
        copy_to(URL, folder)
        for do in (lambda: repair(URL), lambda: merge([URL, folder], tmp_path / "x"), lambda: merge([folder] * 2, URL)):
            with pytest.raises(ValueError, match=r"lies at a URL: copy it to a folder here"):
                do()

    def test_shards_of_rows(self, tmp_path: Path) -> None:
        from apportion.rows import TokenFilter
        from apportion.rows.writer import StoreWriter

        x, labels = torch.randn(90, 4), torch.arange(90)
        for out in (tmp_path / "acts", URL):
            how: Any = {"dtype": "float32", "token_filter": TokenFilter(), "special_ids": ()}
            with StoreWriter(out, {"a": 4}, **how) as writer:
                writer.add({"a": x}, labels, labels, labels)
                writer.finish({"context_tokens": 90})
        assert contents(URL) == on_disk(tmp_path / "acts")
        assert torch.equal(ActivationStore(URL).gather(labels), x)
        with pytest.raises(ZeroDivisionError), StoreWriter("faulty://bucket/b", {"a": 4}, **how) as writer:
            writer.add({"a": x}, labels, labels, labels)
            raise ZeroDivisionError
        assert not contents("faulty://bucket/b")


class TestCommands:
    def test_from_collecting_to_evaluating(
        self, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "text.txt").write_text(" ".join(TEXT) * 4)
        where = ["--cache-dir", str(tmp_path / "mine"), "--cache-gb", "1"]
        collected = ["collect", str(tiny_model_dir), "--hookpoint", OUT, "--text", str(tmp_path / "text.txt")]
        collected += ["--tokens", "2000", "--context-tokens", "8", "--out", URL, *where]
        assert cli.main(collected) == 0 and f"{URL}: 2,000 tokens" in capsys.readouterr().out
        assert cli.main(["cache", "info", URL]) == 0 and f"{URL}: activation cache, 2,000" in capsys.readouterr().out
        assert cli.main(["info", URL, "--verify"]) == 0 and "all checksums agree" in capsys.readouterr().out
        assert cli.main(["cache", "verify", URL, *where]) == 0
        run = str(tmp_path / "run")
        train = ["train", URL, "--out", run, "--d-sae", "64", "--k", "4", "--batch-tokens", "256", *where]
        assert cli.main(train) in (0, 3)
        assert json.loads((tmp_path / "run" / "run.json").read_text())["source"]["folder"] == URL
        assert cli.main(["eval", run]) == 0 and cli.main(["eval", run, "--acts", URL]) == 0
        assert cli.main(["report", run, "--model", str(tiny_model_dir), "--ce-tokens", "256"]) == 0
        assert [*(tmp_path / "mine").glob("*.safetensors")]
        capsys.readouterr()
        (tmp_path / "run" / "run.json").unlink()
        assert cli.main(["eval", run]) == 2
        assert "was not trained here" in (said := capsys.readouterr().err) and f"--acts {URL}" in said
        assert cli.main(["eval", run, "--acts", URL]) == 0

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["cache", "info", "faulty://bucket/none"], "is no activation cache"),
            (["cache", "info", "nope://bucket/none"], "no URL that fsspec can open"),
            (["train", "faulty://bucket/none", "--out", "run"], "is no activation cache"),
            (["cache", "info", URL, "--cache-gb", "0"], "give --cache-gb more than 0"),
            (["cache", "repair", URL], "copy it to a folder here"),
        ],
    )
    def test_mistakes_are_one_line(self, words: list[str], said: str, capsys: Any, monkeypatch: Any) -> None:
        assert cli.main(words) == 2
        assert said in (line := capsys.readouterr().err) and line.count("\n") == 1

    def test_a_package_that_is_missing(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import fsspec.core

        def missing(*args: Any, **how: Any) -> Any:
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
        for words in (["cache", "info"], ["collect", "embedded", "--hookpoint", OUT, "--out"]):
            assert cli.main([*words, "s3://bucket/acts"]) == 2
            said = capsys.readouterr().err
            assert "'s3://bucket/acts' needs s3fs, not installed here" in said and "[s3]" in said


class TestSeveralWriters:
    def test_who_has_been_silent_for_long_is_gone(self) -> None:
        me = {**this_process(), "claim": "another", "at": time.time()}
        assert remote_out._is_free({**me, "pid": 1 << 40, "start": "1"}), "this process ended"
        of_a_container = {**me, "space": "other", "pid": 1}
        assert not remote_out._is_free(of_a_container)
        assert remote_out._is_free({**of_a_container, "at": time.time() - 86400})

    def test_whoever_stood_still_while_another_took_over_commits_nothing(self) -> None:
        out = remote_out.RemoteOut(URL)
        with out.claim(3) as claim:
            assert claim is not None
            claim.check()
            with out.claim(3) as another:
                assert another is None
            remote_out.Claim(out, claim.name)._write()
            with pytest.raises(ValueError, match=r"claims/00003.json was taken over by another process.*stopping"):
                claim.check()

    def test_a_line_that_was_taken_away_in_the_moment_it_came_is_put_there_again(self, folder: Path) -> None:
        copy_to(URL, folder)
        manifest = read_manifest(URL)
        out = remote_out.RemoteOut(URL)
        longer = {**manifest["shards"][-1], "shard": 13}
        for name in ("sha256", "sample_sha256"):
            longer[name] = {file.replace("00012", "00013"): digest for file, digest in longer[name].items()}
        before = out.look({})
        out.note(longer)
        assert [*out.look({})] == [*before, 13]
        out.remote.remove("journal/00013.json")
        assert out.look({})[13] == longer and "journal/00013.json" in contents(URL)
        other = remote_out.RemoteOut(URL)
        assert [*other.look({})] == [*before, 13]

    def test_the_folder_in_which_shards_are_made_does_not_fill(
        self, lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(SIZE_VARIABLE, "0.000001")
        left: list[int] = []
        publish = remote_out.RemoteOut.publish

        def noted(self: Any, digests: Any) -> None:
            publish(self, digests)
            left.append(len(list((tmp_path / "copies").glob("collecting*/**/*.safetensors"))))

        monkeypatch.setattr(remote_out.RemoteOut, "publish", noted)
        tiny(lm, tmp_path / "here", text=TEXT)
        with pytest.raises(ValueError, match="--cache-gb more"):  # to read of it is too much
            tiny(lm, URL, text=TEXT)
        assert left and not any(left)

    def test_who_may_not_delete_ends_well(self, lm: tuple[Any, Any], folder: Path, monkeypatch: Any) -> None:
        def refused(self: Any, name: str) -> None:
            raise Refused(f"{name} may not be deleted")

        monkeypatch.setattr(Remote, "remove", refused)
        assert tiny(lm, URL, text=TEXT)["ended"] == "complete"
        assert torch.equal(
            ActivationStore(URL).gather(torch.arange(400)), ActivationStore(folder).gather(torch.arange(400))
        )

    def test_empty_folders_are_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "acts" / OUT).mkdir(parents=True)
        assert cache_at(f"file://{tmp_path}/acts") is None
        (tmp_path / "acts" / OUT / "mine").touch()
        with pytest.raises(ValueError, match="exists already"):
            cache_at(f"file://{tmp_path}/acts")

    def test_a_file_that_says_that_it_is_long_is_not_fetched(self, folder: Path) -> None:
        copy_to(URL, folder)
        store = ActivationStore(URL)
        header = json.dumps({"acts": {"dtype": "BF16", "shape": [9], "data_offsets": [0, 1 << 40]}}).encode()

        def long(content: bytes) -> bytes:
            return len(header).to_bytes(8, "little") + header

        with failing(changed(long, f"{OUT}/00004.safetensors", times=99)) as requests:
            with pytest.raises(ValueError, match="damaged"):
                store.fetch([4])
            assert len(requests) == 1


def test_passwords_are_not_passed_on() -> None:
    assert in_full("ftp://me:secret@host/acts") == "ftp://me@host/acts"
    assert in_full("s3://bucket/a:b@c") == "s3://bucket/a:b@c"
