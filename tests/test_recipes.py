"""The experiment commands, on a tiny model: they run, resume without repeating work, and refuse other settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from embedded_card import loss_per_character
from embedded_model import TrainModel

from apportion.architectures import SAE, SAES, create
from apportion.evals import evaluate, evaluate_model, evaluate_rows, held_out_rows
from apportion.evals.rows import recalibrate
from apportion.language import TextSource, load_model, read_contexts
from apportion.language.collect import collect
from apportion.recipes import command
from apportion.recipes.compare import METHODS, Compare
from apportion.recipes.experiment import as_now
from apportion.recipes.family import Caches, Family
from apportion.recipes.objectives import Objectives
from apportion.recipes.parts import VALIDATION_SEED, TruthPart
from apportion.recipes.switch import SwitchComparison
from apportion.rows import ActivationStore
from apportion.synthetic import GroundTruthConfig, GroundTruthSource
from apportion.training import Trainer

WORDS = ("the cat sat on the mat and looked at a dog old house by sea was calm sun warm stones she read book").split()  # noqa: SIM905


def some_text(seed: int, words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Compare:
    folder = tmp_path_factory.mktemp("compare")
    model, tokenizer = load_model(tiny_model_dir)
    for seed, (name, tokens) in enumerate({"train": 4000, "valid": 1500}.items()):
        (folder / f"{name}.txt").write_text(some_text(seed, tokens + 100))
        collect(
            model,
            tokenizer,
            "model.layers.1",
            folder / f"{name}.txt",
            tokens=tokens,
            out=folder / name,
            context_tokens=32,
        )
    return Compare(
        acts=(folder / "train",),
        eval_acts=(folder / "valid",),
        out=folder / "results",
        model=str(tiny_model_dir),
        ce_tokens=256,
        lrs=(1e-3, 3e-3),
        seeds=2,
        k=4,
        d_sae=48,
        batch_tokens=256,
        total_tokens=2048,
        window_tokens=1024,
    )


@pytest.mark.slow
def test_every_method_is_compared_and_finished_runs_are_not_repeated(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.run()
    table = capsys.readouterr().out
    results = json.loads((compare.out / "results.json").read_text())
    assert [sum(f"| {method} |" in line for line in table.splitlines()) for method in METHODS] == [2] * len(METHODS)
    assert len(results["grid"]) == 2 * len(METHODS) and len(results["chosen"]) == 2 * len(METHODS)
    for run in results["chosen"]:
        best = min((r for r in results["grid"] if r["name"] == run["name"]), key=lambda r: r["held_out"]["fvu"])
        assert run["lr"] == best["lr"]
        assert run["delta_ce"] == pytest.approx(run["ce_spliced"] - run["ce_clean"])
        assert run["l0"] == pytest.approx(4, rel=0.1)
        assert run["tokens"] + run["filtered_share"] * 752 == pytest.approx(736, abs=16), "every other context of 47"
    assert {p.name for p in (compare.out / "plots").iterdir()} == {"density.png", "l0.png"}
    written = {p: p.stat().st_mtime_ns for p in compare.out.rglob("model.safetensors")}
    assert len(written) >= 3 * len(METHODS)
    compare.run()
    assert capsys.readouterr().out == table
    assert {p: p.stat().st_mtime_ns for p in compare.out.rglob("model.safetensors")} == written

    with pytest.raises(ValueError, match="was started with"):
        dataclasses.replace(compare, k=3).run()


def test_the_embedded_model_learns_and_loads(tmp_path: Path) -> None:
    text = "\n\n".join(some_text(seed, 60) for seed in range(40))
    (tmp_path / "stories.txt").write_text(text)
    small = TrainModel(
        text=tmp_path / "stories.txt",
        valid=tmp_path / "stories.txt",
        out=tmp_path / "model",
        vocab_size=300,
        hidden_size=16,
        layers=1,
        heads=2,
        intermediate_size=32,
        context_tokens=16,
        batch_contexts=4,
        tokens=16 * 4 * 100,
        save_every_steps=50,
    )
    small.run()
    model, tokenizer = load_model(tmp_path / "model")
    some = [some_text(seed, 4) for seed in range(100, 150)]
    trained = loss_per_character(model, tokenizer, some)
    torch.manual_seed(0)
    untrained = loss_per_character(small.model(tokenizer).eval(), tokenizer, some)
    assert trained < 0.8 * untrained
    assert tokenizer.decode(tokenizer("The cat, twice!")["input_ids"]) == "The cat, twice!"


@pytest.mark.slow
def test_objectives_are_compared_and_finished_runs_are_not_repeated(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(some_text(0, 6000))
    settings = {
        "out": tmp_path / "results", "model": str(tiny_model_dir), "text": TextSource(tmp_path / "text.txt"),
        "hookpoint": "model.layers.1", "k": 4, "d_sae": 48, "tokens": 2048, "further_tokens": 512,
        "ce_tokens": 128, "context_tokens": 32,
        "batch_tokens": 256, "mutual_weights": (0.0, 1.0),
    }  # fmt: skip
    Objectives(**settings).run()
    table = capsys.readouterr().out
    assert (tmp_path / "results" / "table.md").read_text() == table
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [r["objective"] for r in found["objectives"]] == ["start", "local", "e2e", "e2e_ds"]
    assert all(r["l0"] <= 4 and r["fvu"] > 0 and "delta_ce" in r for r in found["objectives"])
    assert list(found["layers"]["fvu"]) == [f"model.layers.{i}" for i in range(3)]
    assert [r["weight"] for r in found["mutual"]] == [0.0, 1.0]
    assert found["mutual"][1]["mmcs_ab"] > found["mutual"][0]["mmcs_ab"]

    monkeypatch.setattr(Trainer, "_calibrate", lambda *args: pytest.fail("nothing is trained twice"))
    (tmp_path / "results" / "runs" / "mutual-1.json").unlink()  # finished, but not measured
    Objectives(**settings).run()
    assert capsys.readouterr().out == table
    with pytest.raises(ValueError, match="other settings"):
        Objectives(**settings | {"k": 3}).run()


@pytest.fixture
def family(compare: Compare, tmp_path: Path) -> Family:
    docs = tmp_path / "family.md"
    docs.write_text("# Family\n<!-- truth -->\nold\n<!-- /truth -->\nbetween\n<!-- cache -->\n<!-- /cache -->\nend\n")
    world = GroundTruthConfig(d_in=12, num_features=32, active=2.0, num_roots=2)
    return Family(
        out=tmp_path / "results",
        saes=("topk", "crosscoder", "transcoder", "pca"),
        seeds=(0, 1),
        lrs=(1e-3, 3e-3),
        docs=docs,
        truth=TruthPart(k=2, d_sae=32, total_tokens=1024, batch_tokens=128, eval_tokens=500, world=world),
        cache=Caches(
            k=4, d_sae=48, total_tokens=1024, batch_tokens=256, acts=compare.acts, eval_acts=compare.eval_acts,
            model=compare.model, ce_tokens=128,
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_the_family_is_compared_and_goes_on_where_it_stopped(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate, calls = Trainer._calibrate, []

    def interrupted(self, source):
        calls.append(self.sae.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return calibrate(self, source)

    monkeypatch.setattr(Trainer, "_calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        family.run()
    assert "| `topk` |" in (family.out / "truth.md").read_text(), "results are written as they come"
    family.run()
    names, text = ["topk", "crosscoder", "transcoder", "pca"], family.docs.read_text()
    truth, cache = (json.loads((family.out / f"{part}.json").read_text())["runs"] for part in ("truth", "cache"))
    assert [(r["name"], r["seed"]) for r in truth] == [(name, seed) for seed in (0, 1) for name in names]
    assert [(r["name"], r["seed"]) for r in cache] == [(name, seed) for seed in (0, 1) for name in ("topk", "pca")]
    assert len(calls) == 1 + (3 * 3 + 2) + (3 + 2), "the interrupted one; two rates and a second seed, but once for PCA"
    for run in truth:
        assert {"fvu", "l0", "dead", "mcc", "f1", "uniqueness", "seconds"} <= run.keys()
        assert run["d_sae"] == (24 if run["name"] == "pca" else 32) and run["tokens"] == 500
    for run in cache:
        assert run["delta_ce"] == pytest.approx(run["ce_spliced"] - run["ce_clean"]) and run["l0"] <= 4
    assert text.startswith("# Family\n<!-- truth -->\n32 features in 12 dimensions") and text.endswith("end\n")
    assert "old" not in text and text.count("| `topk` |") == 2 and text.count("`crosscoder`, which takes two") == 1

    done = len(calls)
    family.run()
    assert len(calls) == done and family.docs.read_text() == text
    with pytest.raises(ValueError, match="was started with"):
        dataclasses.replace(family, truth=dataclasses.replace(family.truth, k=1)).run()
    assert len(calls) == done


@pytest.fixture(scope="module")
def several_hookpoints(compare: Compare) -> dict[str, tuple[Path, ...]]:
    """The caches of `compare`, and others of the same text: of two layers, and of an MLP's input and output."""
    model, tokenizer = load_model(compare.model)
    folder, caches = compare.acts[0].parent, {"acts": [*compare.acts], "eval_acts": [*compare.eval_acts]}
    places = {
        "layers": ["model.layers.0", "model.layers.1"],
        "mlp": ["model.layers.1", "model.layers.1.mlp:in", "model.layers.1.mlp"],
    }
    for (key, found), text, tokens in zip(caches.items(), ("train.txt", "valid.txt"), (4000, 1500), strict=True):
        for name, hookpoints in places.items():
            found.append(folder / f"{key}-{name}")
            collect(model, tokenizer, hookpoints, folder / text, tokens=tokens, out=found[-1], context_tokens=32)
    return {key: tuple(found) for key, found in caches.items()}


@pytest.mark.slow
def test_transcoders_and_crosscoders_take_part_where_the_caches_have_their_hookpoints(
    family: Family, several_hookpoints: dict[str, tuple[Path, ...]]
) -> None:
    cache = dataclasses.replace(
        family.cache,
        **several_hookpoints,
        hookpoint="model.layers.1",
        pair=("model.layers.1.mlp:in", "model.layers.1.mlp"),
        sites=("model.layers.0", "model.layers.1"),
    )
    changed = dataclasses.replace(family, seeds=(0,), lrs=(1e-3,), cache=cache)
    changed.run()
    runs = {run["name"]: run for run in json.loads((family.out / "cache.json").read_text())["runs"]}
    assert list(runs) == list(family.saes)
    assert runs["transcoder"]["ce_clean"] == pytest.approx(runs["topk"]["ce_clean"])
    assert runs["transcoder"]["ce_zero_ablation"] != pytest.approx(runs["topk"]["ce_zero_ablation"], rel=1e-6)
    assert "delta_ce" not in runs["crosscoder"] and 0 < runs["crosscoder"]["fvu"] < 1.5
    text = family.docs.read_text()
    assert "`transcoder` reads model.layers.1.mlp:in and predicts model.layers.1.mlp" in text
    assert "`crosscoder` takes model.layers.0 and model.layers.1" in text and "Not in this table" not in text

    written = text
    changed.run()
    assert family.docs.read_text() == written
    for wrong, said in (
        ({"acts": several_hookpoints["acts"][1:], "hookpoint": None}, "several hookpoints"),
        ({"pair": ("model.layers.1",)}, "--pair takes two different"),
        ({"sites": ("model.layers.1", "model.layers.1")}, "--sites takes two different"),
        ({"sites": ("model.layers.1", "model.layers.9")}, "model.layers.9"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(changed, cache=dataclasses.replace(cache, **wrong)).run()


def test_one_run_that_fails_does_not_stop_the_family(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Trainer.fit

    def failing_fit(self, *args, **kwargs):
        if self.sae.name == "topk":
            raise ValueError("loss is nan")
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", failing_fit)
    changed = dataclasses.replace(family, saes=("topk", "pca"), seeds=(0,), lrs=(1e-3,), cache=Caches())
    with pytest.raises(ValueError, match=r"1 runs failed.*topk, seed 0: loss is nan"):
        changed.run()
    text = (family.out / "truth.md").read_text()
    assert "`pca`" in text and "`topk`" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"saes": ("topk", "nobody")}, "nobody"),
        ({"seeds": ()}, "at least one seed"),
        ({"docs": Path("nowhere.md")}, "nowhere.md"),
        ({"cache": Caches(acts=(Path("x"),))}, "--eval-acts"),
        ({"cache": "embedded"}, "embedded is not the model of"),
        ({"truth": TruthPart(k=300)}, "k"),
        ({"truth": TruthPart(world=GroundTruthConfig(active=200))}, "active"),
    ],
)
def test_mistakes_show_before_the_family_is_trained(
    family: Family, changes: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("too late"))
    if changes.get("cache") == "embedded":
        changes = {"cache": dataclasses.replace(family.cache, model="embedded")}
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(family, **changes).run()


def test_every_sae_fits_into_the_family_as_it_is_by_default(family: Family) -> None:
    everything = dataclasses.replace(
        family, saes=tuple(SAES), truth=TruthPart(), cache=dataclasses.replace(family.cache, k=32, d_sae=4608)
    )
    experiments = everything.experiments()
    assert [one.limit for one in experiments] == pytest.approx([1.1 * 4, 1.1 * 32])
    for experiment in experiments:
        experiment.check()


@pytest.fixture
def switch(compare: Compare, tmp_path: Path) -> SwitchComparison:
    docs = tmp_path / "family.md"
    docs.write_text("before\n<!-- switch -->\nold\n<!-- /switch -->\nafter\n")
    return SwitchComparison(
        acts=compare.acts,
        eval_acts=compare.eval_acts,
        out=tmp_path / "switch",
        docs=docs,
        d_sae=48,
        k=4,
        width_matched=(4,),
        flop_matched=(2,),
        seeds=(0, 1),
        batch_tokens=256,
        total_tokens=2048,
    )


@pytest.mark.slow
def test_switch_saes_are_compared_with_topk_and_finished_runs_are_not_repeated(
    switch: SwitchComparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    switch.run()
    table, runs = capsys.readouterr().out, json.loads((switch.out / "results.json").read_text())["runs"]
    assert switch.docs.read_text() == f"before\n<!-- switch -->\n{table}<!-- /switch -->\nafter\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    titles, _, topk, width, flop = (dict(zip(rows[0], row, strict=True)) for row in rows)
    assert len(titles) == 11 and list(runs) == [topk["SAE"], width["SAE"], flop["SAE"]]
    d_in = 2e-6 * switch.d_in
    for row, latents, products in ((topk, 48, 48), (width, 48, 48 / 4 + 4), (flop, 96, 48 + 2)):
        assert int(row["latents"]) == latents and float(row["encoder, MFLOP a token"]) == round(d_in * products, 2)
        assert float(row["step, ms"]) >= 0
    for first, second in runs.values():
        assert (
            (first["seed"], second["seed"]) == (0, 1) and first["lr"] == second["lr"] and first["fvu"] != second["fvu"]
        )
        of_grid = [switch.experiment().folder(first | {"lr": lr}) for lr in switch.lrs]
        held_out = [json.loads((folder / "trained.json").read_text())["held_out"]["fvu"] for folder in of_grid]
        assert first["held_out"]["fvu"] == min(held_out)
        assert [(folder / "result.json").exists() for folder in of_grid].count(True) == 1, "only the chosen rate"
        assert 0 < first["fvu"] < 1 and 0 <= first["duplicated"] <= 1
    assert 1 < runs[width["SAE"]][0]["experts_in_use"] <= 4 and "experts_in_use" not in runs["TopK"][0]

    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("nothing is trained twice"))
    again = dataclasses.replace(switch)
    again.run()
    assert json.loads((switch.out / "results.json").read_text())["runs"] == runs
    with pytest.raises(ValueError, match="was started with"):
        dataclasses.replace(switch, k=3).run()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width_matched": (5,)}, "does not divide"),
        ({"k": 24}, "only the 12 latents"),
        ({"seeds": ()}, "at least one seed"),
        ({"docs": Path("nowhere.md")}, "nowhere.md"),
        ({"acts": (Path("nowhere"),)}, "nowhere"),
    ],
)
def test_mistakes_show_before_switch_saes_are_trained(
    switch: SwitchComparison, changes: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(switch, **changes).run()


def test_the_command_lines_of_recipes_answer_mistakes_and_ctrl_c_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--acts", "nowhere", "--eval-acts", "nowhere", "--out", str(tmp_path / "out"), "--lrs", "1e-3,2e-3"]
    assert command.main(SwitchComparison, "switch", None, words) == 2
    said = capsys.readouterr().err
    assert said.startswith("switch: ") and "nowhere" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()

    def interrupted(self: SwitchComparison) -> None:
        assert self.lrs == (1e-3, 2e-3)
        raise KeyboardInterrupt

    monkeypatch.setattr(SwitchComparison, "run", interrupted)
    assert command.main(SwitchComparison, "switch", None, words) == 130
    assert "what was finished is kept" in capsys.readouterr().err


def test_settings_of_an_older_version_are_those_of_today() -> None:
    said = {"where": "a/corpus", "split": "train", "field": "text", "config": None}
    now = {"where": "a/corpus", "split": "train", "field": "text"}
    assert as_now({"k": 8, "text": said}) == {"k": 8, "text": now} and as_now({"text": None}) == {"text": None}


def test_a_cache_part_measures_contexts_that_nothing_was_fitted_on(compare: Compare, tiny_model_dir: Path) -> None:
    def trained() -> SAE:
        sae = compare.new("mutual_choice aux_zipf", 0)
        return Trainer(sae, compare.config(3e-3, 0)).fit(compare.source(sae, 0), progress=False)

    train, store = ActivationStore(compare.acts[0]), ActivationStore(compare.eval_acts[0])
    even, odd = ((store.contexts % 2 == half).nonzero().squeeze(1) for half in (0, 1))
    sae = trained()
    held_out = evaluate_rows({"": sae}, train, held_out_rows(train, 0.1), progress=False)[""].result()
    as_fitted = evaluate_rows({"": sae}, store, odd, progress=False)[""].result()
    recalibrate(sae, store, even)
    expected = evaluate_rows({"": sae}, store, odd, progress=False)[""].result()
    assert compare.held_out(trained()) == held_out and compare.evaluate(trained()) == {
        "as_fitted": as_fitted, **expected
    } and as_fitted["fvu"] != expected["fvu"]  # fmt: skip

    model, tokenizer = load_model(tiny_model_dir)
    text = compare.acts[0].parent / "valid.txt"
    contexts = read_contexts(tokenizer, text, tokens=2 * compare.ce_tokens, context_tokens=32)[1::2]
    _, entropies = evaluate_model({"": sae}, model, contexts, store.filter, hookpoint=store.hookpoint, progress=False)
    found = compare.finish({"it": trained()})["it"]
    assert found == entropies.of("") | {"l0_difficulty_correlation": found["l0_difficulty_correlation"]}


def test_ground_truth_has_other_rows_to_choose_by_than_to_evaluate_on() -> None:
    part = TruthPart(d_sae=32, eval_tokens=200, world=GroundTruthConfig(d_in=12, num_features=32, num_roots=2))
    sae = create("topk", d_in=12, d_sae=32, k=4)
    rows = {seed: GroundTruthSource(part.world, seed).store(200) for seed in (0, VALIDATION_SEED)}
    chosen_by, shown = part.held_out(sae), part.evaluate(sae)
    assert chosen_by["fvu"] == evaluate(sae, rows[VALIDATION_SEED])["fvu"] != shown["fvu"]
    assert shown["fvu"] == evaluate(sae, rows[0])["fvu"] and "mcc" in shown and "mcc" not in chosen_by


def test_caches_of_two_places_and_unknown_methods_are_refused(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("too late"))
    text = compare.acts[0].parent / "valid.txt"
    collect(*load_model(compare.model), "model.layers.0", text, tokens=200, out=tmp_path / "acts", context_tokens=32)
    with pytest.raises(ValueError, match="differ in hookpoint"):
        dataclasses.replace(compare, eval_acts=(tmp_path / "acts",)).run()
    with pytest.raises(ValueError, match=r"no method named nobody.*topk"):
        dataclasses.replace(compare, methods=("topk", "nobody")).run()
