"""What `apportion eval` and `report` judge by: rows nobody trained on, the right model, the budget asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.architectures import calibrate
from apportion.cli import main
from apportion.evals import Measurement, held_out_rows
from apportion.evals.language_model import evaluate_cache_in_model
from apportion.evals.table import off_budget, print_table
from apportion.language import load_model
from apportion.language.collect import collect
from apportion.rows import ActivationStore, CacheSource, SitesStore, TokenFilter, batch

WORDS = ("the cat sat on the mat and looked at a dog old house by sea was calm sun warm stones she read book").split()  # noqa: SIM905
POINT, OTHER = "model.layers.1", "model.layers.2"


def write_text(file: Path, seed: int, words: int = 9000, known: int | None = None) -> Path:
    chosen = torch.randint(known or len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    file.write_text("\n".join(" ".join(WORDS[i] for i in chosen[j : j + 12]) for j in range(0, words, 12)))
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A cache of two layers, and runs of several kinds on it."""
    home = tmp_path_factory.mktemp("home")
    write_text(home / "train.txt", 0)
    write_text(home / "new.txt", 1, known=4)
    model, tokenizer = load_model(tiny_model_dir)
    for name, text in (("acts", "train.txt"), ("new", "new.txt")):
        collect(model, tokenizer, [POINT, OTHER], home / text, tokens=6000, out=home / name, context_tokens=32)
    store = ActivationStore(home / "acts", POINT)
    for name in ("topk", "mutual_choice", "feature_choice"):
        sae = ap.create(name, d_in=32, d_sae=64, k=4, seed=0)
        ap.Trainer(sae, ap.TrainConfig(lr=3e-3, batch_tokens=256, total_tokens=2560)).fit(
            CacheSource(store), home / name, progress=False
        )
    return home


def evaluated(home: Path, *words: str, out: Path) -> dict[str, Any]:
    assert main(["eval", *words, "--json", str(out / "eval.json")]) == 0
    return json.loads((out / "eval.json").read_text())


def test_of_the_training_cache_only_held_out_rows_count(home: Path, tmp_path: Path) -> None:
    """However the cache is named: by default, with --acts, and as a copy elsewhere."""
    copy = shutil.copytree(home / "acts", tmp_path / "copy")
    store = ActivationStore(home / "acts", POINT)
    wanted = int(store.mask[held_out_rows(store, 0.1)].sum())
    for words in ([], ["--acts", str(home / "acts")], ["--acts", str(copy)]):
        found = evaluated(home, str(home / "topk"), *words, out=tmp_path)
        assert found["tokens"] == wanted and "held-out rows of its training cache" in found["rows"]
    found = evaluated(home, str(home / "topk"), "--acts", str(home / "new"), out=tmp_path)
    assert found["tokens"] == int(ActivationStore(home / "new", POINT).mask.sum())
    assert found["rows"] == f"rows of {home / 'new'}"


def test_other_activations_of_the_training_text_are_refused(
    home: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut into other contexts, its rows may have been trained on."""
    model, tokenizer = load_model(tiny_model_dir)
    collect(model, tokenizer, POINT, home / "train.txt", tokens=3000, out=tmp_path / "acts", context_tokens=16)
    for command in (["eval"], ["report", "--out", str(tmp_path / "r")]):
        assert main([*command, str(home / "topk"), "--acts", str(tmp_path / "acts")]) == 2
        assert "what it has seen of them is not known" in capsys.readouterr().err


def test_the_training_text_is_known_wherever_it_lies(
    home: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a path that is written in another way, and as a copy; another file of the same size is another text."""
    text = (home / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "shard-1.txt").write_text(text.replace("the cat", "cat the"))
    monkeypatch.chdir(tmp_path)
    for file, seen in (("train.txt", True), (str(home / "train.txt"), True), ("shard-1.txt", False)):
        found = evaluated(home, str(home / "topk"), "--text", file, "--tokens", "500", out=tmp_path)
        assert found["rows"] == f"text {file}" + (", which the SAE was trained on" if seen else "")
    model, tokenizer = load_model(tiny_model_dir)
    collect(model, tokenizer, POINT, "train.txt", tokens=3000, out="acts", context_tokens=16)
    assert main(["eval", str(home / "topk"), "--acts", "acts"]) == 2
    assert "what it has seen of them is not known" in capsys.readouterr().err
    collect(model, tokenizer, POINT, "shard-1.txt", tokens=3000, out="others", context_tokens=16)
    assert main(["eval", str(home / "topk"), "--acts", "others"]) == 0


def test_text_is_read_and_the_model_run_as_in_training(home: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """BOS, length of contexts and precision are those that the SAE says."""
    sae, figures = ap.load(home / "topk"), []
    text = ["--model", str(tiny_model_dir), "--text", str(home / "new.txt"), "--tokens", "500"]
    plain = {"bos": "auto", "context_tokens": 32, "model_dtype": "float32"}
    for number, changed in enumerate([{}, {"bos": "never"}, {"context_tokens": 16}, {"model_dtype": "bfloat16"}]):
        sae.source = replace(sae.source, language=replace(sae.source.lm, **plain | changed))
        sae.save(tmp_path / str(number))
        figures.append(evaluated(home, str(tmp_path / str(number)), *text, out=tmp_path)["ce_clean"])
    assert len(set(figures)) == 4


def test_a_report_on_text_leaves_out_what_training_left_out(home: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    sae = ap.load(home / "topk")
    everything = TokenFilter(special_tokens=False, first_position=False, norm_outlier=None)
    sae.source = replace(sae.source, filter=everything.to_dict())
    sae.save(tmp_path / "sae")
    text = ["--model", str(tiny_model_dir), "--text", str(home / "new.txt"), "--tokens", "500", "--ce-tokens", "0"]
    assert main(["report", str(tmp_path / "sae"), *text, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["methods"]["topk"]["filtered_share"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["text", "acts"])
def test_recalibrated_on_half_the_text(
    where: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on = ["--text", str(home / "new.txt")] if where == "text" else ["--acts", str(home / "new")]
    words = [str(home / name) for name in ("topk", "mutual_choice", "feature_choice")]
    before = evaluated(home, *words, *on, "--tokens", "2k", out=tmp_path)["runs"]
    said = capsys.readouterr().out.replace("\n", " ")
    off = [abs(before[name]["l0"] / 4 - 1) > 0.05 for name in words]
    assert any(off) and "L0 is" in said and "--recalibrate" in said
    after = evaluated(home, *words, *on, "--tokens", "2k", "--recalibrate", out=tmp_path)["runs"]
    for name in words:
        assert after[name]["l0"] == pytest.approx(4, rel=0.05) and after[name]["recalibrated"] and after[name]["k"] == 4
        assert 1500 <= after[name]["tokens"] <= 2500, "as many tokens are evaluated as were asked for"
        assert abs(after[name]["l0"] - 4) <= abs(before[name]["l0"] - 4) + 1e-9
    assert "--recalibrate" not in capsys.readouterr().out


@pytest.mark.parametrize("where", ["text", "acts"])
def test_one_context_cannot_be_halved(where: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on = ["--text", str(home / "new.txt")] if where == "text" else ["--acts", str(home / "new")]
    assert main(["eval", str(home / "topk"), *on, "--tokens", "16", "--recalibrate"]) == 2
    assert "give more" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("where", ["text", "acts"])
def test_recalibrating_may_read_the_rows_again(
    where: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it has to where the topics of a text follow each other; here because hardly any match is kept at first."""
    monkeypatch.setattr(calibrate, "HELD", 0)
    monkeypatch.setattr(calibrate, "RESERVE", {False: 0.1, True: 1.25})
    monkeypatch.setattr(batch, "CHUNK", 100)
    reads: list[int] = []
    monkeypatch.setattr(calibrate, "pooled", lambda *given, pooled=calibrate.pooled: reads.append(1) or pooled(*given))
    on = ["--text", str(home / "new.txt")] if where == "text" else ["--acts", str(home / "new")]
    found = evaluated(home, str(home / "mutual_choice"), *on, "--tokens", "3k", "--recalibrate", out=tmp_path)
    assert len(reads) == 2 and found["l0"] == pytest.approx(4, rel=0.1)


def test_the_table_says_what_each_run_was_evaluated_on() -> None:
    from rich.console import Console

    one = {"k": 8, "fvu": 0.5, "l0": 9.0, "tokens": 1000, "mode": "eval", "filtered_share": 0.25, "rows": "rows of a"}
    for second, apart in (({}, False), ({"rows": "rows of b"}, True), ({"tokens": 900}, True)):
        console = Console(record=True, width=200, file=StringIO())
        print_table({"first": one, "second": one | second}, console)
        said = console.export_text()
        assert "first" in said and "second" in said
        assert ("first: 1,000 tokens (rows of a)" in said) is apart and said.count("25.00% of tokens") == 1 + apart
    long = {f"/a/long/way/to/the/runs/of/this/week/{name}": one | {"l0": 8.0} for name in ("first", "second")}
    console = Console(record=True, width=60, file=StringIO())
    print_table(long, console)
    assert "first" in (said := console.export_text()) and "second" in said, "names are not cut"
    assert "--recalibrate" in (off_budget(one) or "")
    assert "more --tokens" in (off_budget(one | {"recalibrated": True}) or "")


def test_a_cache_that_is_missing_is_named_before_anything_is_evaluated(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ap.load(home / "mutual_choice")
    lost.info["source"]["folder"] = "lost"
    lost.save(tmp_path / "lost")
    monkeypatch.setattr(Measurement, "add", lambda *_, **__: pytest.fail("evaluated before all was checked"))
    assert main(["eval", str(home / "topk"), str(tmp_path / "lost")]) == 2
    assert "trained on is not there (lost)" in capsys.readouterr().err
    for command in (["eval"], ["report", "--out", str(tmp_path / "r")]):
        assert main([*command, str(home / "topk"), "--acts", "nowhere"]) == 2
        assert "There is no cache at --acts nowhere" in capsys.readouterr().err


def test_several_runs_stand_in_one_table(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(home / "topk"), str(home / "mutual_choice")]
    together = evaluated(home, *words, "--text", str(home / "new.txt"), "--tokens", "1k", out=tmp_path)
    assert list(together["runs"]) == words
    alone = evaluated(home, words[0], "--text", str(home / "new.txt"), "--tokens", "1k", out=tmp_path)
    assert alone["fvu"] == together["runs"][words[0]]["fvu"] and alone["delta_ce"] is not None
    capsys.readouterr()
    assert main(["eval", words[0], words[0]]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["eval"]) == 2


@pytest.mark.slow
def test_the_chat_model_of_a_base_model(
    home: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    """Other special tokens are the same model; other weights are another, which an option allows."""
    model, tokenizer = load_model(tiny_model_dir)
    model.config.eos_token_id = [2, 7]
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "same"), tokenizer.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.3)
    model.save_pretrained(tmp_path / "tuned"), tokenizer.save_pretrained(tmp_path / "tuned")
    on = ["--text", str(home / "new.txt"), "--tokens", "500"]
    for command in (["eval"], ["report", "--ce-tokens", "64", "--out", str(tmp_path / "report")]):
        assert main([*command, str(home / "topk"), *on, "--model", str(tmp_path / "same")]) == 0
        assert main([*command, str(home / "topk"), *on, "--model", str(tmp_path / "tuned")]) == 2
        said = capsys.readouterr().err
        assert "other weights" in said and "--other-model" in said
        assert main([*command, str(home / "topk"), *on, "--model", str(tmp_path / "tuned"), "--other-model"]) == 0
    assert "how well the SAE does there" in caplog.text


@pytest.mark.parametrize("command", ["eval", "report"])
def test_mistakes_about_the_text_show_before_the_model_is_loaded(
    command: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("apportion.language.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    empty, other = tmp_path / "empty.txt", tmp_path / "text.pdf"
    empty.write_text(""), other.write_bytes(b"%PDF")
    for text, said in ((tmp_path / "no.txt", "no text at"), (empty, "is empty"), (other, "is not a text file")):
        more = ["--out", str(tmp_path / "report")] if command == "report" else []
        assert main([command, str(home / "topk"), "--text", str(text), *more]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "report").exists()


def test_a_model_of_another_width_is_refused_in_words(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = load_model(tiny_model_dir)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    on = ["--text", str(home / "new.txt"), "--model", str(tmp_path / "narrow"), "--other-model"]
    assert main(["eval", str(home / "topk"), *on]) == 2
    assert "width 16" in capsys.readouterr().err


def test_an_evaluator_that_runs_the_model(home: Path, tmp_path: Path, tiny_model_dir: Path, capsys: Any) -> None:
    """On a cache, with the model of the cache."""
    words = [str(home / "topk"), "--acts", str(home / "new"), "--on", "language_model", "--tokens", "640"]
    found = evaluated(home, *words, out=tmp_path)
    store, model = ActivationStore(home / "new", POINT), load_model(tiny_model_dir)[0]
    _, entropies = evaluate_cache_in_model({"it": ap.load(home / "topk")}, store, torch.arange(640), model)
    assert found["delta_ce"] == pytest.approx(entropies.of("it")["delta_ce"], abs=1e-6)
    assert evaluated(home, *words, "--model", str(tiny_model_dir), out=tmp_path) == found
    assert main(["eval", *words[:-3], "geometry", "--model", str(tiny_model_dir)]) == 2
    assert "--model is used together with" in capsys.readouterr().err


def test_an_encoder_has_no_cross_entropy(home: Path, tmp_path: Path, tiny_model_dir: Path, caplog: Any) -> None:
    """A checkpoint without a head gets no random one, and no figures from it."""
    from transformers import BertConfig, BertModel

    _, tokenizer = load_model(tiny_model_dir)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    place = "encoder.layer.1"
    collected = ["collect", str(tmp_path / "bert"), "--hookpoint", place, "--text", str(home / "train.txt")]
    assert main([*collected, "--tokens", "3k", "--context-tokens", "32", "--out", str(tmp_path / "acts")]) == 0
    options = ["--sae", "topk", "--k", "4", "--d-sae", "64", "--batch-tokens", "256", "--out", str(tmp_path / "run")]
    assert main(["train", str(tmp_path / "acts"), *options]) == 0
    found = evaluated(home, str(tmp_path / "run"), "--text", str(home / "new.txt"), "--tokens", "600", out=tmp_path)
    assert "delta_ce" not in found and 0 < found["fvu"] < 2
    assert "does not predict the next token" in caplog.text
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0


def test_an_unfinished_run_is_named_in_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(home / "topk" / "run.json", tmp_path / "run" / "run.json")
    for command in ("eval", "report"):
        assert main([command, str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "has not finished" in said and "--resume" in said
        assert len(said) < 300 and "in no format" not in said


# Reports


def report(words: list[str], out: Path) -> dict[str, Any]:
    assert main(["report", *words, "--ce-tokens", "128", "--out", str(out)]) == 0
    assert "<html" in (out / "report.html").read_text()
    return json.loads((out / "report.json").read_text())


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("sae", "more"),
    [
        ("transcoder", ["--hookpoint", POINT, "--target-hookpoint", OTHER]),
        ("crosscoder", []),
        ("mlsae", []),
        ("gated", ["--hookpoint", POINT]),
    ],
)
@pytest.mark.parametrize("on", ["cache", "text"])
def test_a_report_of_every_kind_of_sae(home: Path, tmp_path: Path, sae: str, more: list[str], on: str) -> None:
    options = ["--sae", sae, "--k", "4", "--d-sae", "64", "--batch-tokens", "256", "--tokens", "1k", *more]
    assert main(["train", str(home / "acts"), *options, "--out", str(tmp_path / "run")]) == 0
    text = [] if on == "cache" else ["--text", str(home / "new.txt")]
    found = report([str(tmp_path / "run"), *text, "--tokens", "600"], tmp_path / "report")
    method = found["methods"][sae]
    assert method["l0"] > 0 and len(found["sweeps"][sae]) >= 1
    assert ("delta_ce" in method) == (sae in ("transcoder", "gated"))
    assert bool(found["latents"]) == (sae != "mlsae")


def test_a_report_on_the_two_caches_of_a_crosscoder(home: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Each with one of its hookpoints, as of a base model and the chat model made from it."""
    model, tokenizer = load_model(tiny_model_dir)
    stores = []
    for point in (POINT, OTHER):
        collect(model, tokenizer, [point], home / "train.txt", tokens=3000, out=tmp_path / point, context_tokens=32)
        stores.append(ActivationStore(tmp_path / point))
    sae = ap.create("crosscoder", d_in=32, num_sites=2, d_sae=64, k=4, seed=0)
    config = ap.TrainConfig(batch_tokens=256, total_tokens=2560)
    ap.Trainer(sae, config).fit(CacheSource(SitesStore(stores)), tmp_path / "run", progress=False)
    found = report([str(tmp_path / "run")], tmp_path / "out")
    figures = evaluated(home, str(tmp_path / "run"), out=tmp_path)
    (of_run,) = found["methods"].values()
    assert of_run["fvu_sites"] == pytest.approx(figures["fvu_sites"])


def test_a_report_leaves_other_peoples_folders_alone(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert main(["report", str(home / "topk"), "--out", str(tmp_path / "mine")]) == 2
    assert "holds something else than a report" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    for _ in range(2):  # its own is made anew
        report([str(home / "topk"), "--tokens", "300"], tmp_path / "report")


def test_arrays_and_documents_in_memory(home: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    from apportion.evals.report import make_report

    sae = ap.load(home / "topk")
    x = ActivationStore(home / "new", POINT).gather(torch.arange(500))
    found = make_report({"topk": sae}, x.numpy(), progress=False)
    assert found.figures["methods"]["topk"]["tokens"] == 500
    assert found.figures["latents"]["topk"][0]["strongest"][0].startswith("<<row ")
    assert "rows of numbers" in found.page and found.figures["baselines"]["pca"]["fvu_by_components"][0] == 1
    model, tokenizer = load_model(tiny_model_dir)
    documents = ["the cat sat on the mat and looked at the dog"] * 60
    collect(model, tokenizer, POINT, documents, tokens=500, out=tmp_path / "acts", context_tokens=32)
    store = ActivationStore(tmp_path / "acts")
    found = make_report({"topk": sae}, store, model=model, tokenizer=tokenizer, ce_tokens=64, progress=False)
    assert "60 documents in memory" in found.page


def test_which_text_fires_a_latent(home: Path) -> None:
    sae, store = ap.load(home / "topk"), ActivationStore(home / "new", POINT)
    codes = sae.encode(store.gather(torch.arange(store.rows))).dense() * store.mask[:, None]
    busiest, silent = int((codes > 0).sum(0).argmax()), int((codes > 0).sum(0).argmin())
    one, other = ap.examples_of(sae, store, [busiest, silent], strongest=3, random=2)
    assert (one.latent, other.latent) == (busiest, silent)
    assert one.density == pytest.approx((codes[:, busiest] > 0).sum().item() / int(store.mask.sum()))
    assert one.largest == pytest.approx(codes[:, busiest].max().item(), rel=1e-4)
    assert len(one.strongest) == 3 and len(one.random) == 2
    top = load_model_tokens(store, int(codes[:, busiest].argmax()))
    assert f"<<{top}>>" in one.strongest[0].replace("<< ", "<<")
    assert all(text.count("<<") == 1 == text.count(">>") for text in one.strongest + one.random)
    assert one.top_tokens[0][1] >= one.top_tokens[-1][1] > 0
    if not codes[:, silent].any():
        assert other.density == 0 and not other.strongest
    for latents, message in (([64], "latents 0 to 63"), ([-1], "latents 0 to 63")):
        with pytest.raises(ValueError, match=message):
            ap.examples_of(sae, store, latents)


def load_model_tokens(store: ActivationStore, row: int) -> str:
    from apportion.language.model import load_tokenizer

    tokenizer = load_tokenizer(store.manifest["model"]["name_or_path"])
    return tokenizer.decode([int(store.tokens[row])]).strip()
