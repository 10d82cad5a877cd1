"""SAEs in our own format whose tensors or settings were changed: they load with the right numbers, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trials import trials

import apportion as ap
from apportion.architectures import SAE, SAES

D, F = 6, 12
X = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
PICKED = ("topk", "mutual_choice", "feature_choice", "jumprelu", "gated", "skip_transcoder", "switch", "crosscoder")
DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
]
EXACT = {torch.float64, torch.float32}
"""What holds numbers of float32."""


@cache
def made(name: str) -> SAE:
    sae = ap.create(name, d_in=D, d_sae=F, k=3, seed=0)
    rows = torch.stack([X, 2 * X], 1) if name == "crosscoder" else X
    sae.fit_input(rows, X) if sae.needs_target else sae.fit_input(rows)
    sae.calibrate(rows)
    return sae.eval()


def tensors_of(name: str) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in made(name).state_dict().items()}


def saved(name: str, folder: Path) -> Path:
    made(name).save(folder)
    return folder


ATTACKS = [
    (f"{name} {tensor} {str(dtype)[6:]}", name, tensor, dtype)
    for name in PICKED
    for tensor, dtype in product(tensors_of(name), DTYPES)
]


@pytest.mark.fault("dtype attacks")
@pytest.mark.parametrize("attack", trials(ATTACKS, short=60))
def test_a_tensor_of_another_dtype_is_read_as_it_is_or_refused(
    attack: tuple[str, str, str, torch.dtype], tmp_path: Path
) -> None:
    _, name, tensor, dtype = attack
    folder, tensors = saved(name, tmp_path), tensors_of(name)
    values = tensors[tensor].nan_to_num(0.5, 2, -2)
    tensors[tensor] = values.abs().to(dtype) if dtype == torch.float8_e8m0fnu else values.to(dtype)
    save_file(tensors, folder / "model.safetensors")
    try:
        sae = ap.load(folder)
    except ValueError as error:
        assert "\n" not in str(error) and str(folder) in str(error) and tensor in str(error)
        assert dtype not in EXACT
        return
    assert dtype in (torch.float16, torch.bfloat16, *EXACT), "no other is a dtype of weights"
    assert {t.dtype for t in sae.state_dict().values()} == {torch.promote_types(dtype, torch.float32)}
    for key, wanted in tensors.items():
        assert torch.equal(sae.state_dict()[key].double().nan_to_num(7), wanted.double().nan_to_num(7)), key


@pytest.mark.fault("dtype attacks")
@pytest.mark.parametrize("dtype", trials(DTYPES))
def test_all_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved("topk", tmp_path)
    save_file({key: t.abs().to(dtype) for key, t in tensors_of("topk").items()}, folder / "model.safetensors")
    if dtype in (torch.float16, torch.bfloat16, *EXACT):
        assert {t.dtype for t in ap.load(folder).state_dict().values()} == {dtype}
    else:
        with pytest.raises(ValueError, match="can hold"):
            ap.load(folder)


BAD_NUMBERS = [
    *(("topk", "input.scale", value) for value in (0.0, -1.0, 1e38, 1e-40, torch.nan, torch.inf)),
    *(("skip_transcoder", name, value) for name in ("output.scale", "input.scale") for value in (0.0, 1e38, -2.0)),
    *(("skip_transcoder", "output.mean", value) for value in (torch.nan, torch.inf)),
    *(("crosscoder", "site_scale", value) for value in (0.0, -1.0, torch.nan)),
    *(("mutual_choice", "allocation.threshold", value) for value in (-1.0, -torch.inf)),
    *(("feature_choice", "allocation.threshold", value) for value in (-0.5,)),
    *(("feature_choice", "allocation.density", value) for value in (-0.1, 1.5, torch.inf)),
    *(("jumprelu", "allocation.log_threshold", value) for value in (torch.nan, torch.inf)),
    *(("jumprelu", "bandwidth", value) for value in (0.0, -0.2, torch.nan)),
    *(("relu", "p", value) for value in (-1.0, 2.0, torch.nan)),
    *(("gated", "coefficient.value", value) for value in (-1.0, torch.nan)),
    *(("gated", "r_mag", value) for value in (torch.nan,)),
]


@pytest.mark.fault("dtype attacks")
@pytest.mark.parametrize("attack", trials([(f"{n} {t} {v}", n, t, v) for n, t, v in BAD_NUMBERS]))
def test_numbers_that_cannot_be_are_refused(attack: tuple[str, str, str, float], tmp_path: Path) -> None:
    _, name, tensor, value = attack
    folder, tensors = saved(name, tmp_path), tensors_of(name)
    tensors[tensor].flatten()[-1:] = value
    save_file({key: t.clone() for key, t in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=tensor) as raised:
        ap.load(folder)
    assert "\n" not in str(raised.value)


def test_thresholds_that_are_not_set_yet_are_loaded(tmp_path: Path) -> None:
    for name in ("mutual_choice", "feature_choice"):
        ap.create(name, d_in=D, d_sae=F, k=3).save(tmp_path / name)
        with pytest.raises(ValueError, match="no thresholds yet"):
            ap.load(tmp_path / name).encode(X)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def removing(part: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["settings"].pop(part)


def setting(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["settings"].update(values)


def saying(**info: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(info=info)


CONFIGS: list[tuple[str, str, Callable[[dict[str, Any]], Any], str]] = [
    *((f"{n} without {part}", n, removing(part), part)
      for n, part in [("topk", "k"), ("topk", "input_norm"), ("topk", "subtract_b_dec"), ("topk", "affinity"),
                      ("matryoshka", "allocation"), ("skip_transcoder", "k"), ("crosscoder", "d_in")]),
    *((f"topk {name} = {value!r}", "topk", setting(**{name: value}), name)
      for name, value in [("subtract_b_dec", "no"), ("subtract_b_dec", 1), ("subtract_b_dec", None), ("k", "3"),
                          ("k", True), ("k", 2.5), ("k", None), ("k", [3]), ("input_norm", "datasets"),
                          ("input_norm", None), ("input_norm", ["dataset"]), ("centre", 5), ("affinity", {}),
                          ("hookpoint", 7), ("hookpoint", ["a"]), ("seed", "0"), ("d_in", "6"), ("d_in", True),
                          ("d_sae", 12.5), ("aux_weight", "big"), ("k_aux", "all")]),
    ("matryoshka detach = 'no'", "matryoshka", setting(detach="no"), "detach"),
    ("matryoshka prefix_shares", "matryoshka", setting(prefix_shares=["all"]), "prefix_shares"),
    ("matryoshka allocation", "matryoshka", setting(allocation=["topk"]), "config.json"),
    ("skip = 'yes'", "skip_transcoder", setting(skip="yes"), "skip"),
    *((f"info = {value!r}", "topk", lambda c, value=value: c.update(info=value), "info")
      for value in ([], "info", 5, None)),
    *((f"info.{part} = {value!r}", "topk", saying(**{part: value}), part)
      for part, value in [("source", []), ("source", None), ("calibration", 5), ("training", "long"), ("format", 5),
                          ("calibration", {"tokens": "many", "l0": 1.0})]),
    *((f"info.source.{part} = {value!r}", "topk", saying(source={part: value}), part)
      for part, value in [("model", "gpt2"), ("model", ["a"]), ("hookpoint", 5), ("folder", 5), ("folder", ["/"]),
                          ("folders", "acts"), ("folders", [1]), ("text", "corpus"), ("filter", []),
                          ("sites", {}), ("sites", [1]), ("sites", [{}]), ("context_tokens", "256"),
                          ("held_out_share", "a tenth"), ("model_dtype", 32), ("bos", True)]),
    *((f"info.source.model.{part} = {value!r}", "topk", saying(source={"model": {part: value}}), part)
      for part, value in [("name_or_path", 5), ("name_or_path", ["a"]), ("probe", "x"), ("probe", [[1]])]),
]  # fmt: skip


@pytest.mark.fault("dtype attacks")
@pytest.mark.parametrize("attack", trials(CONFIGS))
def test_settings_that_decide_and_kinds_of_all(
    attack: tuple[str, str, Callable[[dict[str, Any]], Any], str], tmp_path: Path
) -> None:
    _, name, change, named = attack
    edit(saved(name, tmp_path), change)
    with pytest.raises(ValueError, match=named) as raised:
        ap.load(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("name", PICKED)
def test_settings_that_came_later_mean_their_default(name: str, tmp_path: Path) -> None:
    """What an older version did not know, it did not do."""
    known = SAES[name].settings(to_train=False)
    kept = {"d_in", "d_sae", "num_sites", "skip", "k", "input_norm", "subtract_b_dec", "affinity", "allocation"}
    edit(saved(name, tmp_path), lambda c: [c["settings"].pop(part, None) for part in known.keys() - kept])
    sae, rows = ap.load(tmp_path), torch.stack([X, X], 1) if name == "crosscoder" else X
    assert torch.equal(sae(rows), made(name)(rows))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    for name in PICKED:
        saved(name, tmp_path / name)
        found = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(t.nan_to_num(7), found[key].nan_to_num(7)) for key, t in tensors_of(name).items())
        assert ap.load(tmp_path / name).settings() == made(name).settings()


@pytest.mark.fault("dtype attacks")
@pytest.mark.parametrize("spoil", trials([
    lambda sae: sae.info.update(source="mine"),
    lambda sae: sae.info.update(calibration={"tokens": 3, "l0": float("nan")}),
    lambda sae: sae.b_enc.data.fill_(float("nan")),
    lambda sae: sae.input.scale.fill_(1e20),
]))  # fmt: skip
def test_what_could_not_be_loaded_is_not_saved(spoil: Callable[[Any], Any], tmp_path: Path) -> None:
    sae = ap.create("topk", d_in=4, d_sae=8, k=2)
    sae.save(tmp_path / "sae")
    spoil(sae)
    with pytest.raises(ValueError, match="is not saved: "):
        sae.save(tmp_path / "sae")
    assert torch.equal(ap.load(tmp_path / "sae").input.scale, torch.ones(()))
    with pytest.raises(ValueError, match="is not saved: "):
        sae.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.fault("dtype attacks")
@pytest.mark.parametrize("scale", [1e-18, 1e-16, 1e16, 1e18])
def test_rows_beyond_float32_are_refused_before_a_run(scale: float, tmp_path: Path) -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * scale
    with pytest.raises(ValueError, match="Multiply all rows by one number"):
        ap.create("topk", d_in=4, d_sae=8, k=2).fit_input(x)
