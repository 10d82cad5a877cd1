"""Saving and loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import apportion as ap

D_IN, D_SAE, K = 8, 24, 3


def activations(n: int = 400, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + 5


def ready(name: str, **settings: object) -> ap.SAE:
    """An SAE that is fitted and calibrated."""
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, **settings)
    sae.fit_input(activations())
    sae.calibrate(activations(seed=1))
    return sae.eval()


@pytest.fixture
def folder(tmp_path):
    ready("mutual_choice").save(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("name", ["topk", "mutual_choice", "feature_choice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_saved_sae_is_the_same_sae(name, dtype, tmp_path):
    sae = ready(name).to(dtype)
    sae.info["note"] = {"words": ["ä", 1]}
    sae.train()
    sae.save(tmp_path / "deep" / "sae")
    loaded = ap.load(tmp_path / "deep", subfolder="sae")
    assert not loaded.training and loaded.name == name and loaded.info == sae.info
    assert loaded.settings() == sae.settings() and loaded.dtype == dtype
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for key, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    x = activations(50, seed=2).to(dtype)
    sae.eval()
    assert torch.equal(loaded(x), sae(x)) and torch.equal(loaded.encode(x).dense(), sae.encode(x).dense())
    sae.train(), loaded.train()
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize("name", ["topk", "mutual_choice", "feature_choice"])
def test_all_settings_survive(name, tmp_path):
    changed = {
        "d_in": 4, "d_sae": 16, "k": 2, "input_norm": "token_norm", "centre": "geometric_median",
        "affinity": "code_times_decoder_norm", "hookpoint": "model.layers.1", "subtract_b_dec": False, "aux": "none",
    }  # fmt: skip
    sae = ap.create(name, **changed)
    sae.save(tmp_path)
    settings = ap.load(tmp_path).settings()
    assert {key: settings[key] for key in changed} == changed


def test_a_file_from_before_there_were_starts_says_that_it_began_at_random(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"].pop("init") == "data"
    for replaced in (config, {key: value for key, value in config.items() if key != "id"}):
        (folder / "config.json").write_text(json.dumps(replaced))
        assert ap.load(folder).settings()["init"] == "random"


def test_an_sae_that_is_not_calibrated_can_be_saved(tmp_path):
    ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=K).save(tmp_path)
    with pytest.raises(ValueError, match="calibrate"):
        ap.load(tmp_path).encode(activations(3))


def test_saving_again_replaces(folder):
    sae = ap.load(folder)
    with torch.no_grad():
        sae.b_dec += 1
    sae.save(folder)
    assert torch.equal(ap.load(folder).b_dec, sae.b_dec)
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut config": (lambda f: cut(f / "config.json", 50), "not valid JSON"),
    "empty config": (lambda f: cut(f / "config.json", 0), "not valid JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "no text in UTF-8"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "cut weights": (lambda f: cut(f / "model.safetensors", 300), "damaged"),
    "cut header": (lambda f: cut(f / "model.safetensors", 5), "damaged"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), "damaged"),
    "foreign format": (lambda f: edit_config(f, lambda c: c.update(format="other")), "not written by apportion"),
    "newer version": (lambda f: edit_config(f, lambda c: c.update(version=99)), "version 99.*Upgrade"),
    "odd version": (lambda f: edit_config(f, lambda c: c.update(version="two")), "version"),
    "no settings": (lambda f: edit_config(f, lambda c: c.pop("settings")), "settings"),
    "odd info": (lambda f: edit_config(f, lambda c: c.update(info=[1])), r"info is \[1\], and should be an object"),
    "unknown name": (lambda f: edit_config(f, lambda c: c.update(sae="mutual_choise")), "mutual_choice"),
    "odd name": (lambda f: edit_config(f, lambda c: c.update(sae=[1])), "config.json"),
    "unknown setting": (lambda f: edit_config(f, lambda c: c["settings"].update(auxx=1)), "aux"),
    "setting of a wrong type": (lambda f: edit_config(f, lambda c: c["settings"].update(k="3")), "config.json"),
    "other width": (lambda f: edit_config(f, lambda c: c["settings"].update(d_in=9)), r"shape \[24, 8\]"),
    "NaN": (lambda f: edit_tensors(f, lambda t: t["W_dec"][2].fill_(torch.nan)), "W_dec holds NaN or infinity"),
    "a lie about width": (lambda f: edit_config(f, lambda c: c["settings"].update(d_sae=10**15)), "d_sae = 1000"),
    "a lie about both": (
        lambda f: edit_config(f, lambda c: c["settings"].update(d_sae=10**15, d_in=10**15)), "its config says d_sae"
    ),
    "a deep config": (lambda f: (f / "config.json").write_text("[" * 200_000), "not valid JSON"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop("W_enc")), "W_enc"),
    "extra tensor": (lambda f: edit_tensors(f, lambda t: t.update(other=torch.ones(2))), "other"),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update(b_enc=torch.ones(3))), r"b_enc has shape \[3\].*\[24\]"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_files_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        ap.load(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        ap.load(tmp_path / "nowhere")
