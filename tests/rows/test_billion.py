"""A billion rows are opened, shuffled and trained on in less than a gigabyte: files of holes stand for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from apportion.language import load_model
from apportion.language.collect import collect
from apportion.rows import TokenFilter
from apportion.rows.layout import sealed
from apportion.rows.shards import sample_sha256_of

PLACE = "model.layers.1"
WIDTH = 32
SHARDS, ROWS = 100, 10_000_000
SIZES = {"F32": 4, "I32": 4, "BF16": 2}

SCRIPT = """
import sys, threading, time
import torch
from apportion.architectures import create
from apportion.rows import ActivationStore, CacheSource
from apportion.training import TrainConfig, Trainer

most, going = [0], [True]
def watch():
    while going:
        lines = open("/proc/self/status").read().splitlines()
        most[0] = max(most[0], int(next(line for line in lines if line.startswith("RssAnon")).split()[1]))
        time.sleep(0.02)

before = int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
threading.Thread(target=watch, daemon=True).start()
store = ActivationStore(sys.argv[1])
window = None if sys.argv[2] == "exact" else int(sys.argv[2]) // store.part_rows[0]
source = CacheSource(store, held_out_share=0.0, window=window)
assert source.num_rows == int(sys.argv[3]), source.num_rows
trainer = Trainer(create("topk", d_in=source.d_in, d_sae=64, k=4), TrainConfig(batch_tokens=4096))
batches, seen = source.batches(4096), []
for _ in range(12):
    batch = next(batches)
    seen.append(batch.index)
    trainer.step(torch.randn_like(batch.x))
rows = torch.cat(seen)
assert len(rows.unique()) == len(rows)
print((most[0] - before) // 1024, int(rows.max() - rows.min()))
"""


def sparse(file: Path, columns: dict[str, tuple[str, list[int]]]) -> None:
    """A file of zeros that takes no room."""
    header, at = {}, 0
    for name, (dtype, shape) in columns.items():
        size = SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + at)


@pytest.fixture(scope="module")
def cache(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("billion") / "acts"
    every = TokenFilter(special_tokens=False, first_position=False, norm_outlier=None)
    text = ["the cat sat on the mat and looked at the dog " * 20]
    collect(*load_model(tiny_model_dir), PLACE, text, out=out, tokens=64, context_tokens=8, token_filter=every)
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    shards = []
    for number in range(SHARDS):
        files = [f"tokens-{number:05}.safetensors", f"{PLACE}/{number:05}.safetensors"]
        sparse(out / files[0], {name: ("I32", [ROWS]) for name in ("tokens", "positions", "contexts")})
        sparse(out / files[1], {"acts": ("BF16", [ROWS, WIDTH]), "norms": ("F32", [ROWS])})
        known = {"sha256": dict.fromkeys(files, "0" * 64)}
        known["sample_sha256"] = {file: sample_sha256_of(out / file) for file in files}
        shards.append({"shard": number, "rows": ROWS, "contexts": ROWS // 8, **known})
    manifest |= {"shards": shards, "rows": SHARDS * ROWS, "contexts": SHARDS * ROWS // 8, "shard_contexts": ROWS // 8}
    (out / "manifest.json").write_text(json.dumps(sealed(manifest)))
    (out / "journal.jsonl").unlink(missing_ok=True)
    return out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("window", ["exact", str(ROWS)])
def test_a_billion_rows(window: str, cache: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, str(cache), window, str(SHARDS * ROWS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    megabytes, spread = map(int, done.stdout.split())
    of_windows = 0 if window == "exact" else 2 * ROWS * (2 * WIDTH + 12) / 1e6
    assert megabytes < 1000 + of_windows, megabytes
    assert spread > 0.99 * SHARDS * ROWS
