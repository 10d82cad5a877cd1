"""How fast activations are collected, read and shared out.

    python -m benchmarks.streams --model MODEL --text FILE              # collect, read
    python -m benchmarks.streams --cases sweep,suite                    # on the embedded model
    python -m benchmarks.streams --json result.json

| case | what is measured | in units of |
| --- | --- | --- |
| collect | `collect` of some tokens into a cache, all of it | the bare forward pass up to the hookpoint, same batches |
| read | a shuffled cache, warm; in windows, with nothing in the page cache | reading its files in order |
| sweep | 8 SAEs on one cache, from the first step to the last | their steps alone |
| suite | every layer and three sites of a model at once, likewise | their steps alone |

The two sides of a ratio are measured in turns; medians. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from apportion.architectures import create
from apportion.language import LiveSource, load_model, read_contexts
from apportion.language.captured import Captured
from apportion.language.collect import collect
from apportion.language.hookpoints import layer_stack, middle_layer
from apportion.language.layer_sites import places_in_model
from apportion.language.model import run_contexts
from apportion.language.text import TextSource
from apportion.memory import keep_freed
from apportion.rows import ActivationStore, CacheSource, TokenFilter
from apportion.rows.writer import StoreWriter
from apportion.training import TrainConfig, Trainer
from apportion.training.together import fit_together
from benchmarks.train_step import hardware

CASES = ("collect", "read", "sweep", "suite")


def timed(what: Callable[[], Any]) -> float:
    started = perf_counter()
    what()
    return perf_counter() - started


def collecting(args: argparse.Namespace, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    place, text = args.hookpoint or middle_layer(model), text_of(args)
    contexts = read_contexts(tokenizer, text, tokens=args.tokens, context_tokens=256)

    def bare() -> None:
        for ids in contexts.split(16):
            run_contexts(model, [place], ids)

    def whole() -> None:
        out = folder / f"acts-{len(list(folder.iterdir()))}"
        collect(model, tokenizer, place, text, tokens=args.tokens, out=out)

    bare()
    pairs = [(timed(bare), timed(whole)) for _ in range(args.repeats)]
    ratios = [whole / bare for bare, whole in pairs]
    return {
        "hookpoint": place,
        "tokens": contexts.numel(),
        "forward_tokens_per_s": contexts.numel() / median(bare for bare, _ in pairs),
        "collect_over_forward": median(ratios),
        "ratios": ratios,
    }


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def forget(folder: Path) -> None:
    """Out of the page cache."""
    os.sync()
    for file in files_of(folder):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def made_cache(out: Path, rows: int, d_in: int, shard_rows: int) -> Path:
    """A cache of rows at random, of contexts of 256."""
    every = TokenFilter(special_tokens=False, first_position=False, norm_outlier=None)
    with StoreWriter(out, {"made": d_in}, dtype="bfloat16", token_filter=every, special_ids=()) as writer:
        writer.shard_rows = shard_rows
        for start in range(0, rows, shard_rows):
            number = torch.arange(start, min(rows, start + shard_rows))
            x = torch.randn(len(number), d_in).to(torch.bfloat16)
            writer.add({"made": x}, number % 1000, number % 256, number // 256)
        writer.finish({"context_tokens": 256})
    return out


def rows_per_s(source: CacheSource, batch: int, batches: int) -> float:
    """As training takes them."""
    stream = source.stored_batches(batch)
    next(stream)
    seconds = timed(lambda: [next(stream) for _ in range(batches)])
    stream.close()
    return batch * batches / seconds


def reading(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Of rows of 576 numbers of 16 bits."""
    acts = made_cache(folder / "made", args.rows, 576, args.rows // 20)
    store, batch = ActivationStore(acts), 4096
    size, batches = sum(file.stat().st_size for file in files_of(acts)), args.rows // 2 // 4096

    def on() -> None:
        for file in files_of(acts):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def whole_epoch() -> None:
        store = ActivationStore(acts)
        stream = CacheSource(store, 0.0, window=len(store.part_rows) // 10).stored_batches(batch)
        for _ in range(args.rows // batch):
            next(stream)
        stream.close()

    buffer = bytearray(1 << 24)
    row_bytes = store.row_bytes
    on()
    warm = [rows_per_s(CacheSource(store, window=None), batch, batches) for _ in range(args.repeats)]
    store = None  # mapped files stay in the page cache
    cold = []
    for _ in range(args.repeats):
        forget(acts)
        along = size / timed(on)
        forget(acts)
        cold.append((along, args.rows * row_bytes / timed(whole_epoch)))
    return {
        "rows": args.rows,
        "warm_rows_per_s": median(warm),
        "cold_sequential_bytes_per_s": median(along for along, _ in cold),
        "cold_windows_bytes_per_s": median(own for _, own in cold),
        "cold_windows_over_sequential": median(own / along for along, own in cold),
    }


def over_steps(trainers: dict[str, Trainer], sources: Any, out: Path) -> dict[str, float]:
    """Time of all of `fit_together`, and from the first step to the last, over that of the steps."""
    marks = list[float]()
    step = Trainer.step

    def noted(self: Trainer, batch: Any) -> Any:
        marks.append(perf_counter())
        metrics = step(self, batch)
        marks.append(perf_counter())
        return metrics

    Trainer.step = noted  # type: ignore[method-assign]
    try:
        seconds = timed(lambda: fit_together(trainers, sources, out, progress=False))
    finally:
        Trainer.step = step  # type: ignore[method-assign]
    first = len(trainers)  # before their first steps, runs look at their rows and begin
    steps = sum(end - start for start, end in zip(marks[::2], marks[1::2], strict=True))
    later = sum(end - start for start, end in zip(marks[2 * first :: 2], marks[2 * first + 1 :: 2], strict=True))
    return {
        "runs": len(trainers),
        "steps_each": trainers[next(iter(trainers))].steps,
        "seconds": seconds,
        "over_steps": seconds / steps,
        "over_steps_behind_the_first": (marks[-1] - marks[2 * first - 1]) / later,
    }


def sweeping(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    acts = made_cache(folder / "swept", args.rows // 4, 576, args.rows // 16)
    config = TrainConfig(batch_tokens=2048, total_tokens=2048 * args.steps)
    kinds = [(sae, k) for sae in ("topk", "mutual_choice") for k in (16, 32, 64, 128)]
    trainers = {
        f"{sae}-{k}": Trainer(create(sae, d_in=576, d_sae=args.d_sae, k=k), config) for sae, k in kinds
    }  # fmt: skip
    return over_steps(trainers, CacheSource(ActivationStore(acts)), folder / "sweep")


def suiting(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """On the embedded model, or --model."""
    model, tokenizer = load_model(args.model)
    text = text_of(args)
    config = TrainConfig(batch_tokens=2048, total_tokens=2048 * args.steps)
    contexts = read_contexts(tokenizer, text, tokens=int(1.2 * 2048 * args.steps), context_tokens=256)
    captured = Captured(model, tokenizer, contexts)
    places = places_in_model(model, f"{layer_stack(model)[0]}.*", ["residual", "attention", "mlp"])
    sources = {
        place.name: LiveSource(model, tokenizer, place.hookpoint, contexts, captured=captured, buffer_tokens=1 << 15)
        for place in places
    }
    trainers = {
        name: Trainer(create("mutual_choice", d_in=source.d_in, d_sae=args.d_sae, k=32), config)
        for name, source in sources.items()
    }
    found = over_steps(trainers, sources, folder / "suite")
    passes = captured.passes * contexts.shape[1] / (trainers[places[0].name].tokens)
    return found | {"model_passes_over_training_tokens": passes, "seconds_in_the_model": captured.seconds}


def text_of(args: argparse.Namespace) -> Any:
    from apportion.embedded import stories

    return TextSource(tuple(stories())) if args.text is None else TextSource(args.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)}, with commas")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--hookpoint", help="default: the middle layer")
    parser.add_argument("--text", help="a file; default: the stories that come with the package")
    parser.add_argument("--tokens", type=int, default=65_536, help="to collect")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the cache that is read")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed()
    found: dict[str, Any] = {"hardware": hardware("cpu")}
    for case in args.cases.split(","):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
            if case == "collect":
                found[case] = collecting(args, *load_model(args.model), Path(name))
            elif case in ("read", "sweep", "suite"):
                found[case] = {"read": reading, "sweep": sweeping, "suite": suiting}[case](args, Path(name))
            else:
                raise SystemExit(f"There is no case {case!r}; there are {', '.join(CASES)}.")
        print(json.dumps({case: found[case]}, indent=2), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
