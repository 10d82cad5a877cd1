"""Our SAEs for SAEBench, SAELens' tools and delphi: what these read is there, and says the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import CLOSE, D_IN, D_SAE, differs
from safetensors.torch import load_file
from torch import nn
from trained import DATA, SAES, trained

import apportion as ap
from apportion.interop.adapters import PassesOutliers
from apportion.interop.export import unit
from apportion.interop.outliers import Outliers
from apportion.rows import ActivationStore, TokenFilter
from apportion.rows.writer import StoreWriter

RECONSTRUCTING = [(name, settings) for name, settings in SAES if "transcoder" not in name]
X = DATA[:24]


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), RECONSTRUCTING, ids=str)
def test_sae_bench_gets_the_same_numbers(name: str, settings: dict[str, Any]) -> None:
    sae = trained(name, **settings)
    bench = ap.to_sae_bench(sae)
    z = sae.encode(X)
    norms = (sae if sae.input.kind.startswith("token") else sae.folded()).decoder_norms()  # type: ignore[operator]
    folded_norms = settings.get("affinity") == "code_times_decoder_norm" and name in ("topk", "switch")
    wanted = z.dense() * unit(sae) * (1 if folded_norms else norms)
    for shape in ((24,), (4, 6)):
        x = X.reshape(*shape, D_IN)
        codes = bench.encode(x)
        assert codes.shape == (*shape, D_SAE)
        assert torch.equal(codes.reshape(24, -1) != 0, wanted != 0)
        assert differs(codes.reshape(24, -1), wanted) < CLOSE
        for x_hat in (bench.decode(codes), bench(x)):
            assert x_hat.shape == x.shape
            assert differs(x_hat, sae.decode(z, X).reshape_as(x)) < CLOSE


@pytest.mark.parametrize(("name", "settings"), RECONSTRUCTING, ids=str)
def test_sae_bench_gets_the_parameters_it_wants(name: str, settings: dict[str, Any]) -> None:
    bench = ap.to_sae_bench(trained(name, **settings))
    assert isinstance(bench, nn.Module) and not bench.training
    parameters = dict(bench.named_parameters())
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    assert all(parameters[part].shape == shape for part, shape in shapes.items())
    assert torch.allclose(bench.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)


CFG = {
    *("model_name", "d_in", "d_sae", "hook_layer", "hook_name", "dtype", "context_size", "hook_head_index"),
    *("architecture", "apply_b_dec_to_input", "finetuning_scaling_factor", "activation_fn_str", "device"),
    *("activation_fn_kwargs", "prepend_bos", "normalize_activations", "model_from_pretrained_kwargs", "dataset_path"),
    *("dataset_trust_remote_code", "seqpos_slice", "training_tokens", "sae_lens_training_version", "neuronpedia_id"),
}
"""What SAEBench's contract names."""


def test_what_sae_bench_is_told() -> None:
    sae = trained("mutual_choice", hookpoint="transformer.h.7")
    sae.info |= {"source": {"model": {"name_or_path": "openai-community/gpt2"}, "context_tokens": 64, "bos": "never"}}
    cfg = ap.to_sae_bench(sae).cfg
    assert vars(cfg).keys() >= CFG and cfg.to_dict() == vars(cfg)
    json.dumps(cfg.to_dict())
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("gpt2", "blocks.7.hook_resid_post", 7)
    assert (cfg.d_in, cfg.d_sae, cfg.architecture, cfg.context_size) == (D_IN, D_SAE, "mutual_choice", 64)
    assert (cfg.dtype, cfg.device, cfg.prepend_bos) == ("float32", "cpu", False)
    nothing = ap.to_sae_bench(trained("topk")).cfg
    assert (nothing.model_name, nothing.hook_name, nothing.hook_layer) == (None, None, None)
    given = ap.to_sae_bench(trained("topk"), model_name="pythia-70m", hook_name="blocks.3.hook_mlp_out").cfg
    assert (given.model_name, given.hook_name, given.hook_layer) == ("pythia-70m", "blocks.3.hook_mlp_out", 3)


def test_sae_bench_moves_it() -> None:
    bench = ap.to_sae_bench(trained("jumprelu"))
    assert (bench.dtype, bench.device) == (torch.float32, torch.device("cpu"))
    moved = bench.to(device="cpu", dtype=torch.bfloat16)
    assert moved is bench and bench.dtype == torch.bfloat16 and bench.cfg.dtype == "bfloat16"
    assert bench(X.bfloat16()).dtype == torch.bfloat16


def test_sae_bench_may_want_gradients() -> None:
    bench, x = ap.to_sae_bench(trained("topk")), X.clone().requires_grad_()
    bench(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.any()) and bench.W_enc.grad is not None


def test_changing_the_copy_leaves_the_sae_alone() -> None:
    sae = trained("relu")
    before = sae(X)
    bench = ap.to_sae_bench(sae)
    with torch.no_grad():
        for p in bench.parameters():
            p.zero_()
    assert torch.equal(sae(X), before)


def test_what_sae_bench_cannot_have() -> None:
    with pytest.raises(ValueError, match="transcoder does not"):
        ap.to_sae_bench(trained("transcoder"))
    with pytest.raises(ValueError, match="calibrate"):
        ap.to_sae_bench(ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=3))
    bench = ap.to_sae_bench(trained("mlsae"))
    with pytest.raises(ValueError, match="encode the same rows before"):
        bench.decode(torch.zeros(3, D_SAE))


def test_to_sae_lens_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ImportError, match="pip install sae-lens"):
        ap.to_sae_lens(trained("topk"))


LENGTH = 5
CONTEXTS = 6


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(CONTEXTS * LENGTH).reshape(CONTEXTS, LENGTH) * 7 % 97
    return tokens, DATA[: CONTEXTS * LENGTH].reshape(CONTEXTS, LENGTH, D_IN)


def cache(folder: Path, tokens: torch.Tensor, x: torch.Tensor) -> ActivationStore:
    """A cache that leaves out the first position of each context."""
    widths, rows = {"model.layers.3": D_IN}, CONTEXTS * LENGTH
    with StoreWriter(folder, widths, dtype="float32", token_filter=TokenFilter(), special_ids=()) as writer:
        place = torch.arange(rows)
        writer.add({"model.layers.3": x.reshape(rows, D_IN)}, tokens.flatten(), place % LENGTH, place // LENGTH)
        writer.finish({"model": {"name_or_path": "a/model"}, "text": {"where": "x"}, "context_tokens": LENGTH})
    return ActivationStore(folder)


def read_back(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What delphi makes of it: dense codes [contexts, positions, d_sae], and the tokens."""
    dense = torch.zeros(CONTEXTS, LENGTH, D_SAE)
    covered: list[int] = []
    tokens = torch.zeros(0)
    for file in folder.glob("*.safetensors"):
        first, last = (int(part) for part in file.stem.split("_"))
        covered += range(first, last + 1)
        columns = load_file(file)
        assert columns["locations"].dtype == torch.uint16 and columns["activations"].dtype == torch.float16
        assert columns["tokens"].dtype == torch.int64
        context, position, latent = columns["locations"].long().T
        assert not len(latent) or int(latent.max()) <= last - first
        dense[context, position, latent + first] = columns["activations"].float()
        tokens = columns["tokens"]
    assert sorted(covered) == list(range(D_SAE))
    return dense, tokens


@pytest.mark.parametrize("n_splits", [1, 3, D_SAE])
def test_delphi_finds_the_codes(n_splits: int, tmp_path: Path) -> None:
    sae = trained("topk", hookpoint="model.layers.3")
    sae.info["source"] = {"model": {"name_or_path": "a/model"}}
    tokens, x = texts()
    pairs = [(tokens[:4], x[:4]), (tokens[4:], x[4:])]
    folder = ap.write_delphi_cache(sae.train(), pairs, tmp_path / "latents", n_splits)
    assert sae.training and folder == tmp_path / "latents" / "model.layers.3"
    assert len(list(folder.glob("*.safetensors"))) == n_splits
    dense, found = read_back(folder)
    assert torch.equal(found, tokens)
    assert differs(dense, sae.encode(x).dense() * unit(sae)) < 1e-3
    config = json.loads((folder / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_splits"], config["model_name"]) == (LENGTH, n_splits, "a/model")


def test_delphi_gets_a_store_without_its_filtered_tokens(tmp_path: Path) -> None:
    sae, (tokens, x) = trained("feature_choice"), texts()
    store = cache(tmp_path / "acts", tokens, x)
    assert not store.mask.all() and store.mask.any()
    dense, found = read_back(ap.write_delphi_cache(sae, store, tmp_path / "latents", 2))
    assert torch.equal(found, tokens)
    wanted = sae.encode(x).dense() * unit(sae) * store.mask.reshape(CONTEXTS, LENGTH, 1)
    assert differs(dense, wanted) < 1e-3


def test_delphi_stays_within_float16(tmp_path: Path) -> None:
    sae, (tokens, x) = trained("relu", input_norm="none"), texts()
    folder = ap.write_delphi_cache(sae, [(tokens, x * 1e6)], tmp_path, 1)
    assert bool(read_back(folder)[0].isfinite().all())


def test_mistakes_with_delphi(tmp_path: Path) -> None:
    sae, (tokens, x) = trained("topk"), texts()
    with pytest.raises(ValueError, match="n_splits must lie between 1 and d_sae = 20"):
        ap.write_delphi_cache(sae, [(tokens, x)], tmp_path, 21)
    with pytest.raises(ValueError, match="Contexts of 4 tokens follow some of 5"):
        ap.write_delphi_cache(sae, [(tokens, x), (tokens[:, :4], x[:, :4])], tmp_path)
    with pytest.raises(ValueError, match="Give pairs of tokens"):
        ap.write_delphi_cache(sae, [(tokens, x[0])], tmp_path)
    with pytest.raises(ValueError, match="no contexts"):
        ap.write_delphi_cache(sae, [], tmp_path)
    assert not list(tmp_path.iterdir())
    ap.write_delphi_cache(sae, [(tokens, x)], tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        ap.write_delphi_cache(sae, [(tokens, x)], tmp_path)


class TestOutliers:
    """Rows that training left out for their norm: no codes, and returned as they were."""

    LIMIT = 12.0

    def sae(self, name: str = "topk", **settings: Any) -> ap.SAE:
        sae = trained(name, **settings)
        sae.info["source"] = {"filter": TokenFilter(median_norm=self.LIMIT / 10, norm_outlier=10.0).to_dict()}
        return sae

    @pytest.mark.parametrize("lead", [(24,), (4, 6)])
    @pytest.mark.parametrize("name", ["topk", "feature_choice", "mlsae", "switch"])
    def test_sae_bench(self, name: str, lead: tuple[int, ...]) -> None:
        sae = self.sae(name, **({"num_experts": 4} if name == "switch" else {}))
        bench, plain = ap.to_sae_bench(sae), ap.to_sae_bench(sae, pass_outliers=False)
        x = X.reshape(*lead, D_IN)
        out = x.norm(dim=-1) > self.LIMIT
        assert out.any() and not out.all()
        with torch.no_grad():
            codes, usual = bench.encode(x), plain.encode(x)
            assert not codes[out].any() and usual[out].any()
            assert torch.equal(codes[~out], usual[~out])
            for x_hat in (bench.decode(codes), bench(x)):
                assert torch.equal(x_hat[out], x[out]) and torch.equal(x_hat[~out], plain(x)[~out])
            assert not torch.equal(plain(x)[out], x[out])

    def test_codes_that_were_changed_are_decoded(self) -> None:
        """And so are codes of other rows: only a row that was above the limit and has no codes is put back."""
        bench = ap.to_sae_bench(self.sae())
        with torch.no_grad():
            codes = bench.encode(X)
            out = (X.norm(dim=-1) > self.LIMIT).nonzero().squeeze(1)
            codes[out[0], 3] = 2.0
            x_hat = bench.decode(codes)
            assert torch.allclose(x_hat[out[0]], 2 * bench.W_dec[3] + bench.b_dec)
            assert torch.equal(x_hat[out[1]], X[out[1]])
            assert torch.allclose(bench.decode(torch.zeros(3, D_SAE)), bench.b_dec.expand(3, -1))

    @pytest.mark.parametrize("changed", [{"norm_outlier": None}, {"norm_outlier": 0.0}, {"median_norm": None}])
    def test_without_a_limit_nothing_passes(self, changed: dict[str, Any]) -> None:
        sae = trained("relu")
        sae.info["source"] = {"filter": {**TokenFilter(median_norm=0.1).to_dict(), **changed}}
        with torch.no_grad():
            assert differs(ap.to_sae_bench(sae)(X), sae(X)) < CLOSE

    @torch.no_grad()
    def test_a_class_of_another_library(self) -> None:
        """What to_sae_lens puts before SAELens's class; rows may come by heads."""

        class Theirs(nn.Module):
            def encode(self, x: torch.Tensor) -> torch.Tensor:
                return x.flatten(-2).relu() + 1

            def decode(self, codes: torch.Tensor) -> torch.Tensor:
                return (codes * 3).unflatten(-1, (2, 3))

        theirs = Theirs()
        theirs.outliers, theirs.__class__ = Outliers(self.LIMIT), type("Theirs", (PassesOutliers, Theirs), {})
        x = X.reshape(4, 6, 2, 3)
        out = x.flatten(-2).norm(dim=-1) > self.LIMIT
        codes = theirs.encode(x)
        assert codes.shape == (4, 6, D_IN) and not codes[out].any() and bool(codes[~out].all())
        x_hat = theirs.decode(codes)
        assert torch.equal(x_hat[out], x[out]) and torch.equal(x_hat[~out], Theirs.decode(theirs, codes)[~out])


class TestHeads:
    """SAEBench turns the reshaping of a hook_z off and on again, and reads whether it was on."""

    def bench(self) -> Any:
        sae = trained("topk", hookpoint="transformer.h.1.attn.c_proj:in")
        sae.info["source"] = {"model": {"name_or_path": "gpt2"}}
        return ap.to_sae_bench(sae)

    @torch.no_grad()
    def test_rows_by_heads_and_flat(self) -> None:
        bench = self.bench()
        assert bench.cfg.hook_name == "blocks.1.attn.hook_z" and bench.hook_z_reshaping_mode
        x = X.reshape(4, 6, 2, 3)
        by_heads, flat = bench(x), bench(x.flatten(-2))
        assert by_heads.shape == x.shape and torch.equal(by_heads.flatten(-2), flat)
        codes = bench.encode(x)
        assert codes.shape == (4, 6, D_SAE) and bench.decode(codes).shape == x.shape
        bench.turn_off_forward_pass_hook_z_reshaping()
        assert not bench.hook_z_reshaping_mode
        assert bench.decode(bench.encode(x.flatten(-2))).shape == (4, 6, D_IN)
        bench.turn_on_forward_pass_hook_z_reshaping()
        assert bench.hook_z_reshaping_mode and bench(x).shape == x.shape

    def test_elsewhere_it_is_off(self) -> None:
        bench = ap.to_sae_bench(trained("topk"))
        assert not bench.hook_z_reshaping_mode
        bench.turn_off_forward_pass_hook_z_reshaping()
        assert bench(X).shape == X.shape
