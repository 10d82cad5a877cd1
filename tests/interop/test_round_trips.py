"""The other libraries themselves, where they are installed, load what we write."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import CLOSE, D_SAE, differs
from torch import Tensor
from trained import DATA, SAES, trained

import apportion as ap
from apportion.interop.export import unit
from apportion.rows import TokenFilter

X = DATA[:40]


def exported(sae: ap.SAE, folder: Path, format: str) -> bool:
    """False where there is no route."""
    try:
        ap.export(sae, folder, format)
    except ValueError as error:
        assert "sae.save" in str(error)
        return False
    return True


def assert_same(sae: ap.SAE, codes: Tensor, y_hat: Tensor) -> None:
    z = sae.encode(X)
    wanted = z.dense() * unit(sae)
    assert torch.equal(codes != 0, wanted != 0)
    assert differs(codes, wanted) < CLOSE
    assert differs(y_hat, sae.decode(z, X)) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), SAES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_sae_lens_reads_ours(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = trained(name, **settings)
    if exported(sae, tmp_path / "a", "sae_lens"):
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "a")
        assert_same(sae, theirs.encode(X), theirs(X))


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), SAES, ids=str)
def test_dictionary_learning_reads_ours(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    utils = pytest.importorskip("dictionary_learning.utils")
    for unit_rows in (False, True):
        sae = trained(name, **settings)
        if unit_rows:
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)  # type: ignore[operator]
        if exported(sae, tmp_path / str(unit_rows), "dictionary_learning"):
            theirs, _ = utils.load_dictionary(str(tmp_path / str(unit_rows)), "cpu")
            assert_same(sae, theirs.encode(X), theirs(X))


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), SAES, ids=str)
def test_sparsify_reads_ours(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    sae = trained(name, **settings)
    if exported(sae, tmp_path / "a", "sparsify"):
        theirs = sparsify.Sae.load_from_disk(tmp_path / "a")
        codes = theirs.encode(X)
        dense = torch.zeros(len(X), D_SAE).scatter(1, codes.top_indices, codes.top_acts)
        assert_same(sae, dense, theirs(X).sae_out)


@torch.no_grad()
@pytest.mark.parametrize("name", ["topk", "mutual_choice", "gated", "mlsae"])
def test_to_sae_lens_is_what_dashboards_expect(name: str) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = trained(name, hookpoint="model.layers.3")
    sae.info["source"] = {"model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M"}, "context_tokens": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lens = ap.to_sae_lens(sae)
    assert isinstance(lens, sae_lens.SAE)
    assert_same(sae, lens.encode(X), lens(X))
    about = lens.cfg.metadata
    assert (about.model_name, about.hook_name) == ("HuggingFaceTB/SmolLM2-135M", "blocks.3.hook_resid_post")
    assert (about.context_size, about.prepend_bos, about.dataset_path) == (32, False, None)
    assert lens.cfg.architecture() == {"mutual_choice": "jumprelu", "mlsae": "topk"}.get(name, name)
    assert lens.cfg.to_dict()["d_sae"] == lens.cfg.d_sae == D_SAE
    if name in ("mutual_choice", "gated"):
        before = lens(X)
        lens.fold_W_dec_norm()
        assert differs(lens(X), before) < CLOSE


@torch.no_grad()
def test_to_sae_lens_leaves_outliers_alone() -> None:
    pytest.importorskip("sae_lens")
    sae = trained("mutual_choice")
    sae.info["source"] = {"filter": TokenFilter(median_norm=1.2).to_dict()}
    out = X.norm(dim=-1) > 12
    assert out.any() and not out.all()
    lens, plain = ap.to_sae_lens(sae), ap.to_sae_lens(sae, pass_outliers=False)
    assert not lens.encode(X)[out].any() and plain.encode(X)[out].any()
    assert torch.equal(lens(X)[out], X[out]) and torch.equal(lens(X)[~out], plain(X)[~out])
    assert lens.cfg.architecture() == "jumprelu" and lens.cfg.metadata.seqpos_slice == [1, None]
    lens.fold_W_dec_norm()
    assert torch.equal(lens(X)[out], X[out])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
def test_sae_lens_folds_our_topk(affinity: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = trained("topk", affinity=affinity)
    if affinity == "code":
        sae.constrain()
    ap.export(sae, tmp_path / "a", "sae_lens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "a", fold_W_dec_norm=True)
    assert_same(sae, theirs.encode(X), theirs(X))
