"""How long training waits for a cache at a URL: the share of a run's time in which it stands without a batch.

    python -m benchmarks.remote s3://bucket/acts [--rows 200000] [--d-in 128] [--d-sae 2048] [--shard-mb 0.9]

Rows are drawn, written there in shards of --shard-mb (in bfloat16) unless a cache is there already, and one SAE
is trained on them once: with an empty folder of copies, then with what it holds since. The first run has to fetch every
shard. With --server a moto server on this machine is the object store (pip install s3fs 'moto[server]'), at s3://bench.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import apportion as ap
from apportion.rows import ActivationStore, Batch, CacheSource, TokenFilter, writer
from apportion.rows.copies import Copies
from apportion.rows.opening import settings_of
from apportion.rows.place import place_of
from benchmarks.train_step import hardware


class Timed(CacheSource):
    """Adds up the seconds in which somebody waits for a batch, or for the rows that training begins at."""

    first_s = waited_s = 0.0

    def sample(self, n: int) -> Batch:
        began = time.perf_counter()
        batch = super().sample(n)
        self.first_s += time.perf_counter() - began
        return batch

    def stored_batches(self, batch_tokens: int) -> Iterator[Batch]:
        batches = super().stored_batches(batch_tokens)
        while True:
            began = time.perf_counter()
            batch = next(batches)
            self.waited_s += time.perf_counter() - began
            yield batch


@contextmanager
def served() -> Iterator[None]:
    """An S3 server on this machine with a bucket, in a process of its own."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    try:
        for _ in range(100):
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        import s3fs

        s3fs.S3FileSystem().mkdir("bench")
        yield
    finally:
        server.terminate()
        server.wait()


def write(url: str, rows: int, d_in: int, shard_bytes: int) -> None:
    writer.SHARD_BYTES = shard_bytes
    asked: Any = {"dtype": "bfloat16", "token_filter": TokenFilter(), "special_ids": ()}
    numbers = torch.Generator().manual_seed(0)
    with writer.StoreWriter(url, {"x": d_in}, **asked) as out:
        for first in range(0, rows, 4096):
            at = torch.arange(first, min(first + 4096, rows))
            out.add({"x": torch.randn(len(at), d_in, generator=numbers)}, at % 1000, at % 256, at // 256)
        out.finish({"context_tokens": 256, "contexts": -(-rows // 256)})


def trained(url: str, copies: Copies, d_sae: int, batch_tokens: int) -> dict[str, Any]:
    began = time.perf_counter()
    source = Timed(store := ActivationStore(url, copies=copies))
    opened = time.perf_counter() - began
    sae = ap.create("topk", **settings_of(source), d_sae=d_sae, k=32)
    config = ap.TrainConfig(total_tokens=source.num_rows, batch_tokens=batch_tokens)
    began = time.perf_counter()
    ap.Trainer(sae, config).fit(source, progress=False)
    seconds = time.perf_counter() - began
    return {
        "shards": store.num_shards,
        "open_s": round(opened, 2),
        "train_s": round(seconds, 2),
        "first_rows_s": round(source.first_s, 2),
        "batches_s": round(source.waited_s, 2),
        "waited_share": round((source.first_s + source.waited_s) / seconds, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="s3://bench/acts")
    parser.add_argument("--server", action="store_true")
    for name, value in (("rows", 200_000), ("d-in", 128), ("d-sae", 2048), ("batch-tokens", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--shard-mb", type=float, default=0.9)
    options = parser.parse_args()
    with ExitStack() as until_then:
        if options.server:
            until_then.enter_context(served())
        folder = Path(until_then.enter_context(tempfile.TemporaryDirectory()))
        os.environ["APPORTION_CACHE_DIR"] = str(folder / "written")
        found: dict[str, Any] = {"hardware": hardware("cpu"), "threads": torch.get_num_threads()}
        if place_of(options.url).manifest() is None:
            began = time.perf_counter()
            write(options.url, options.rows, options.d_in, int(options.shard_mb * (1 << 20)))
            found["write_s"] = round(time.perf_counter() - began, 2)
        for name in ("fetched", "here already"):
            found[name] = trained(options.url, Copies(folder / "copies"), options.d_sae, options.batch_tokens)
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
