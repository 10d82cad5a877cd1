"""Whether rows read in windows train as well as rows in exact order: FVU of both, over seeds.

    python -m benchmarks.mixing --model MODEL --text FILE --acts acts/ --windows exact,65536,16384 --json result.json

A cache of many small shards is collected (unless --acts has one), and the same SAE is trained on it in each order; FVU
is of rows that were used for neither training nor calibration. Windows are of so many rows; with --whole-shards they
are made of shards, as those of a cache at a URL. Each run that is finished is printed at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

from apportion.architectures import create
from apportion.evals import evaluate_rows
from apportion.evals.rows import unseen_rows
from apportion.language import load_model
from apportion.language.collect import collect, is_collected
from apportion.language.hookpoints import middle_layer
from apportion.memory import keep_freed
from apportion.rows import ActivationStore, CacheSource, writer
from apportion.rows import store as rows_store
from apportion.training import TrainConfig, Trainer
from benchmarks.train_step import hardware


def made(args: argparse.Namespace) -> ActivationStore:
    if not is_collected(args.acts):
        model, tokenizer = load_model(args.model)
        place = args.hookpoint or middle_layer(model)
        with patch.object(writer, "SHARD_ROWS", args.shard_rows):
            collect(model, tokenizer, place, args.text, tokens=args.tokens, out=args.acts, context_tokens=256)
    return ActivationStore(args.acts)


def trained(store: ActivationStore, window: str, seed: int, args: argparse.Namespace) -> float:
    parts = None if window == "exact" else max(1, round(int(window) * len(store.part_rows) / store.rows))
    source = CacheSource(store, seed=seed, window=parts)
    sae = create(args.sae, d_in=store.d_in, d_sae=args.d_sae, k=args.k, seed=seed)
    config = TrainConfig(total_tokens=int(args.epochs * source.num_rows), batch_tokens=args.batch_tokens, seed=seed)
    Trainer(sae, config).fit(source, progress=False)
    rows, _ = unseen_rows(store, sae, str(args.acts))
    return evaluate_rows({"sae": sae}, store, rows[: args.eval_rows], progress=False)["sae"].result()["fvu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--hookpoint", help="default: the middle layer")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--windows", default="exact,65536,16384")
    parser.add_argument("--whole-shards", action="store_true")
    parser.add_argument("--sae", default="mutual_choice")
    parser.add_argument("--epochs", type=float, default=1.0)
    sizes = {"tokens": 500_000, "shard-rows": 16_384, "d-sae": 4608, "k": 32, "batch-tokens": 1024, "seeds": 3}
    for name, value in (sizes | {"eval-rows": 20_000}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed()
    if args.whole_shards:
        rows_store.PART_BYTES = 1 << 40
    store, found = made(args), dict[str, Any]()
    about = {"hardware": hardware("cpu"), "rows": store.rows, "shards": store.num_shards, "shard_rows": args.shard_rows}
    for window in args.windows.split(","):
        fvu = []
        for seed in range(args.seeds):
            fvu.append(trained(store, window, seed, args))
            print(json.dumps({"window": window, "seed": seed, "fvu": fvu[-1]}), flush=True)
        found[window] = {"fvu": fvu, "mean": mean(fvu), "stdev": stdev(fvu) if len(fvu) > 1 else None}
    print(json.dumps(result := about | {"windows": found}, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
