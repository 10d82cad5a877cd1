"""ap.load: which format a path is in, where files come from, and files that are damaged or mean harm."""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from naive import D_IN, D_SAE, assert_computes, inputs, rand
from safetensors.torch import load_file, save_file

import apportion as ap
from apportion.interop.formats import FORMATS
from apportion.interop.peek import names_in, settings_in

STATE = {
    "encoder.weight": rand(D_SAE, D_IN, seed=1),
    "encoder.bias": rand(D_SAE, seed=2),
    "decoder.weight": rand(D_IN, D_SAE, seed=3),
    "bias": rand(D_IN, seed=4),
}


def write_pt(folder: Path) -> Path:
    """dictionary_learning's AutoEncoder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(STATE, folder / "ae.pt")
    return folder


def write_safetensors(folder: Path) -> Path:
    """The same, as SAELens would save it."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "metadata": {"sae_lens_version": "6.0.0"}}
    (folder / "cfg.json").write_text(json.dumps(settings))
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "bias"}
    stored = {ours: STATE[theirs].T.contiguous() if "W" in ours else STATE[theirs] for ours, theirs in names.items()}
    save_file(stored, folder / "sae_weights.safetensors")
    return folder


def assert_is_the_sae(sae: ap.SAE) -> None:
    x = inputs()
    z = ((x - STATE["bias"]) @ STATE["encoder.weight"].T + STATE["encoder.bias"]).relu()
    assert_computes(sae, x, z, z @ STATE["decoder.weight"].T + STATE["bias"])


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_folders_files_and_subfolders(write, tmp_path):
    folder = write(tmp_path / "run" / "deep")
    weights = next(f for f in folder.iterdir() if f.suffix != ".json")
    for sae in (
        ap.load(folder),
        ap.load(str(weights)),
        ap.load(tmp_path / "run", subfolder="deep"),
        ap.load(str(tmp_path), "run/deep"),
        ap.load(tmp_path, subfolder="run/../run/deep"),
    ):
        assert_is_the_sae(sae)


def test_ours_comes_first_and_can_be_named(tmp_path):
    write_pt(tmp_path)
    write_safetensors(tmp_path)
    ours = ap.create("topk", d_in=4, d_sae=8, k=2, seed=0).eval()
    ours.save(tmp_path)
    x = rand(5, 4, seed=0)
    for sae in (ap.load(tmp_path), ap.load(tmp_path, format="apportion"), ap.load(tmp_path / "model.safetensors")):
        assert sae.d_in == 4 and "format" not in sae.info and torch.equal(sae(x), ours(x))
    for name in ("sae_lens", "dictionary_learning"):
        sae = ap.load(tmp_path, format=name)
        assert sae.info["format"] == name
        assert_is_the_sae(sae)


def test_a_cache_of_links_is_followed(tmp_path):
    """Downloads of the Hub are folders of links that lead out of them."""
    blobs, snapshot = write_safetensors(tmp_path / "blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert_is_the_sae(ap.load(snapshot))


def test_what_is_loaded_can_be_evaluated_calibrated_and_trained_on(tmp_path):
    sae = ap.load(write_pt(tmp_path))
    x = inputs().repeat(20, 1)
    assert sae.calibrate(x) == pytest.approx(sae.encode(x).l0().float().mean().item())
    before = sae.W_dec.detach().clone()
    trainer = ap.Trainer(sae, ap.TrainConfig(batch_tokens=len(x), lr=1e-2))
    losses = [trainer.step(x)["loss"].item() for _ in range(20)]
    assert losses[-1] < losses[0] and not torch.equal(sae.W_dec, before)
    assert sae.W_enc.is_contiguous() and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """What is asked of the Hub, which has one SAE."""
        asked = []

        def download(repo: str, subfolder: str | None) -> Path:
            asked.append((repo, subfolder))
            return write_pt(tmp_path / "cache")

        hub = types.SimpleNamespace(download=download)
        monkeypatch.setitem(sys.modules, "apportion.interop.hub", hub)
        monkeypatch.chdir(tmp_path)
        return asked

    @pytest.mark.parametrize("name", ["org/name", "gpt2-small-res-jb", "Some.Org/name_2"])
    def test_names_that_are_no_path(self, name, asked):
        assert_is_the_sae(ap.load(name, "blocks.8.hook_resid_pre"))
        assert_is_the_sae(ap.load(Path(name)))
        assert asked == [(name, "blocks.8.hook_resid_pre"), (name, None)]

    def test_a_path_that_exists_is_no_repository(self, asked, tmp_path):
        write_pt(tmp_path / "org" / "name")
        assert_is_the_sae(ap.load("org/name"))
        assert not asked

    @pytest.mark.parametrize("name", ["./org/name", "a/b/c", "/nowhere/name", "../name", "org/na me", ""])
    def test_names_that_are_no_repository_either(self, name, asked):
        with pytest.raises(ValueError, match=r"does not exist|in no format"):
            ap.load(name)
        assert not asked


class TestMistakes:
    def test_an_unknown_format(self, tmp_path):
        with pytest.raises(ValueError, match="no format 'saelens'; known are: apportion, sae_lens"):
            ap.load(write_pt(tmp_path), format="saelens")

    def test_what_is_in_no_format_names_all_of_them(self, tmp_path):
        (tmp_path / "model.onnx").write_bytes(b"123")
        (tmp_path / "layers.3").mkdir()
        with pytest.raises(ValueError, match="in no format that is known") as raised:
            ap.load(tmp_path)
        for word in ("model.onnx", "layers.3", "subfolder", "cfg.json", "apportion", *FORMATS):
            assert word in str(raised.value), word

    def test_a_file_that_is_in_no_format(self, tmp_path):
        (tmp_path / "x.bin").write_bytes(b"123")
        with pytest.raises(ValueError, match=r"x\.bin is in no format that is known"):
            ap.load(tmp_path / "x.bin")

    @pytest.mark.parametrize("name", ["sae_lens", "sparsify", "dictionary_learning"])
    def test_a_format_that_it_is_not(self, name, tmp_path):
        with pytest.raises(ValueError, match="has no"):
            ap.load(tmp_path, format=name)

    def test_settings_that_mean_nothing(self, tmp_path):
        with pytest.raises(ValueError, match=r"config: K mean nothing to .* read as dictionary_learning"):
            ap.load(write_pt(tmp_path), config={"K": 3})
        ap.create("topk", d_in=4, d_sae=8, k=2).save(tmp_path / "ours")
        with pytest.raises(ValueError, match="leave out config"):
            ap.load(tmp_path / "ours", config={"k": 3})

    def test_the_config_of_the_caller_is_left_alone(self, tmp_path):
        known = {"dict_class": "AutoEncoder"}
        ap.load(write_pt(tmp_path), config=known)
        assert known == {"dict_class": "AutoEncoder"}

    @pytest.mark.parametrize("subfolder", ["../secret", "..", "a/../../secret", "/", "/etc"])
    def test_a_path_that_climbs_out(self, subfolder, tmp_path):
        write_pt(tmp_path / "secret")
        (tmp_path / "here" / "a").mkdir(parents=True)
        with pytest.raises(ValueError, match="leads out of"):
            ap.load(tmp_path / "here", subfolder=subfolder)

    def test_a_subfolder_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="has no nowhere"):
            ap.load(write_pt(tmp_path), subfolder="nowhere")


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def weights_of(folder: Path) -> Path:
    return folder / "sae_weights.safetensors"


DAMAGE = {
    "cut weights": (lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:700]), "is damaged"),
    "cut header": (lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:20]), "is damaged"),
    "empty weights": (lambda f: weights_of(f).write_bytes(b""), "is damaged"),
    "a long header": (lambda f: weights_of(f).write_bytes((2**40).to_bytes(8, "little") + b"{}"), "is damaged"),
    "weights as a folder": (lambda f: (weights_of(f).unlink(), weights_of(f).mkdir()), "in no format that is known"),
    "no weights": (lambda f: weights_of(f).unlink(), "in no format that is known.*cfg.json"),
    "no config": (lambda f: (f / "cfg.json").unlink(), "has no cfg.json"),
    "cut config": (lambda f: (f / "cfg.json").write_text('{"d_in": 6'), "cfg.json is not valid JSON"),
    "binary config": (lambda f: (f / "cfg.json").write_bytes(b"\xff\xfe"), "cfg.json is no text in UTF-8"),
    "a list": (lambda f: (f / "cfg.json").write_text("[1]"), "does not hold a JSON object"),
    "a deep config": (lambda f: (f / "cfg.json").write_text("[" * 200_000), "cfg.json is not valid JSON"),
    "a missing tensor": (lambda f: rewrite(weights_of(f), lambda t: t.pop("b_enc")), "b_enc is missing; it has W_dec"),
    "an extra tensor": (lambda f: rewrite(weights_of(f), lambda t: t.update(x=torch.ones(1))), "unexpected x"),
    "NaN": (lambda f: rewrite(weights_of(f), lambda t: t["W_dec"][3].fill_(torch.nan)), "W_dec holds NaN or infinity"),
    "infinity": (lambda f: rewrite(weights_of(f), lambda t: t["b_enc"][3:4].fill_(-torch.inf)), "b_enc holds NaN"),
    "no latents": (lambda f: rewrite(weights_of(f), lambda t: t.update(W_enc=torch.ones(D_IN, 0))), "W_enc has shape"),
    "transposed": (lambda f: rewrite(weights_of(f), lambda t: t.update(W_enc=t["W_dec"].clone())), "W_enc has shape"),
    "one dimension": (lambda f: rewrite(weights_of(f), lambda t: t.update(W_enc=torch.ones(D_SAE))), "W_enc has shape"),
    "odd metadata": (lambda f: (f / "cfg.json").write_text(json.dumps({"metadata": 3, "architecture": None})), "None"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_files_are_refused(damage, message, tmp_path):
    folder = write_safetensors(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as raised:
        ap.load(folder)
    assert str(tmp_path) in str(raised.value), "it says which file"


def test_large_but_finite_weights_are_not_refused(tmp_path):
    """Their sum overflows, and nothing else."""
    folder = write_safetensors(tmp_path)
    rewrite(weights_of(folder), lambda t: t["W_dec"].fill_(3e38))
    assert ap.load(folder).W_dec.max() == 3e38


class Bomb:
    """Unpickling it creates the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def save_legacy(content: object, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def save_pickle(content: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_pickle])
@pytest.mark.parametrize("name", ["ae.pt", "sae.pt", "anything.pt", "anything.pth"])
@pytest.mark.parametrize("known", [True, False])
def test_a_pickle_bomb_does_not_go_off(save, name, known, tmp_path):
    fuse = tmp_path / "went-off"
    save((STATE if known else {}) | {"bomb": Bomb(fuse)}, tmp_path / name)
    for how in ({}, *({"format": n} for n in FORMATS)):
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(ValueError):
                ap.load(path, **how)
    with pytest.raises(ValueError, match=r"execute code|is damaged"):
        ap.load(tmp_path)
    assert not fuse.exists()


def test_what_has_to_be_unpickled_needs_consent(tmp_path):
    """A backup whose configuration is an object, and objects can be anything."""
    backup = {"ae": STATE, "config": types.SimpleNamespace(lr=1), "norm_factor": 1.0}
    torch.save(backup, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"would execute code.*load\(\.\.\., trust=True\)"):
        ap.load(tmp_path)
    assert_is_the_sae(ap.load(tmp_path, trust=True))


@pytest.mark.parametrize("length", [0, 10, 200, 1000])
@pytest.mark.parametrize("zipped", [True, False])
def test_cut_pickles(zipped, length, tmp_path):
    file = write_pt(tmp_path) / "ae.pt"
    torch.save(STATE, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:length])
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=r"ae\.pt"):
            ap.load(path)


HOLLOW = {
    "expanded": lambda: torch.ones(1, 1).expand(10**6, 10**6),
    "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (D_SAE, D_IN)),
    "meta": lambda: torch.empty(D_SAE, D_IN, device="meta"),
    "complex": lambda: torch.ones(D_SAE, D_IN, dtype=torch.complex64),
    "true or false": lambda: torch.ones(D_SAE, D_IN, dtype=torch.bool),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("hollow", HOLLOW)
def test_tensors_that_claim_more_than_they_hold(hollow, tmp_path):
    torch.save(STATE | {"encoder.weight": HOLLOW[hollow]()}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"ae\.pt: encoder\.weight (holds torch|claims the shape)"):
        ap.load(tmp_path)


def test_parameters_are_tensors(tmp_path):
    torch.save({name: torch.nn.Parameter(t) for name, t in STATE.items()}, tmp_path / "ae.pt")
    assert_is_the_sae(ap.load(tmp_path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_whatever_is_wrong_with_a_file_is_a_value_error(write, tmp_path):
    """A byte of the first thousand, or of the last, is another one."""
    folder = write(tmp_path)
    file = next(f for f in folder.iterdir() if f.suffix != ".json")
    good = file.read_bytes()
    g = torch.Generator().manual_seed(0)
    where = (
        torch.randint(0, 1000, (60,), generator=g).tolist() + torch.randint(1, 600, (30,), generator=g).neg().tolist()
    )
    for i, byte in zip(where, torch.randint(0, 256, (90,), generator=g).tolist(), strict=True):
        bad = bytearray(good)
        bad[i] = byte
        file.write_bytes(bad)
        try:
            assert ap.load(folder).d_in == D_IN
        except ValueError as error:
            assert str(tmp_path) in str(error)


class TestNames:
    """What a look into a file finds, without reading or executing it."""

    def test_of_all_kinds(self, tmp_path):
        save_file({"a": torch.ones(1), "b.c": torch.ones(1)}, tmp_path / "x.safetensors", {"author": "me"})
        np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.ones(3))
        torch.save(OrderedDict(a=torch.ones(2), deep={"b": torch.ones(2)}), tmp_path / "x.pt")
        save_legacy({"a": torch.ones(2), "b": 3}, tmp_path / "old.pt")
        assert names_in(tmp_path / "x.safetensors") == {"a", "b.c"}
        assert names_in(tmp_path / "x.npz") == {"a", "b"}
        assert {"a", "deep", "b"} <= names_in(tmp_path / "x.pt")
        assert {"a", "b"} <= names_in(tmp_path / "old.pt")

    def test_of_nothing(self, tmp_path):
        for name in ("x.safetensors", "x.npz", "x.pt", "x.json", "x"):
            assert not names_in(tmp_path / name) and not settings_in(tmp_path / name)
            for content in (b"", b"\x00" * 64, b"\xff" * 9, b"PK\x03\x04" + bytes(40), b"[[[[", b"\x80\x02}q\x00."):
                (tmp_path / name).write_bytes(content)
                assert not names_in(tmp_path / name) and not settings_in(tmp_path / name)

    def test_recognising_never_raises(self, tmp_path):
        weights = ["ae.pt", "sae.pt", "samples_1.pt", "params.npz", "params.safetensors", "sae.safetensors"]
        configs = ["cfg.json", "config.json", "hyperparams.json", "final_config.yaml"]
        for name in [*weights, *configs, "model.safetensors", "sae_weights.safetensors"]:
            (tmp_path / name).write_bytes(b"\x80\x04 nonsense {")
        for known in FORMATS.values():
            for path in (tmp_path, *tmp_path.iterdir(), tmp_path / "nowhere"):
                assert known.recognises(path) in (True, False)


class TestAddresses:
    """Whole, as they were given: a path would make one slash of two."""

    @pytest.mark.parametrize(
        ("address", "said"),
        [
            ("https://huggingface.co/org/name", 'here load("org/name")'),
            ("https://huggingface.co/org/name/", 'here load("org/name")'),
            ("https://huggingface.co/org/name/tree/main/a/b", 'here load("org/name", subfolder="a/b")'),
            ("hf://org/name/layer_3.safetensors", 'here load("org/name", subfolder="layer_3.safetensors")'),
        ],
    )
    def test_of_the_hub(self, address, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for given in (address, Path(address)):
            with pytest.raises(ValueError) as raised:
                ap.load(given)
            assert f"{address.rstrip('/') if given != address else address} does not exist" in str(raised.value)
            assert said in str(raised.value)

    @pytest.mark.parametrize("address", ["s3://bucket", "a//b/c"])
    def test_of_nothing(self, address, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError) as raised:
            ap.load(address)
        assert str(raised.value).startswith(f"{address} does not exist") and "here load" not in str(raised.value)

    def test_a_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write_pt(tmp_path / "sae")
        sae = ap.load("~/sae")
        assert_is_the_sae(sae)
        ap.export(sae, "~/out", "sae_lens")
        assert (tmp_path / "out" / "cfg.json").is_file()


def write_topk(folder: Path) -> Path:
    """dictionary_learning's AutoEncoderTopK, with a configuration that leaves out k."""
    names = {"bias": "b_dec"}
    torch.save({names.get(name, name): tensor for name, tensor in STATE.items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"}}))
    return folder


class TestK:
    """What L0 is to be, of SAEs that have no budget."""

    def test_is_not_invented(self, tmp_path):
        assert ap.load(write_pt(tmp_path)).k is None
        sae = ap.load(write_pt(tmp_path), config={"k": 5})
        assert sae.k == 5
        sae.save(tmp_path / "ours")
        assert ap.load(tmp_path / "ours").k == 5
        ap.load(write_pt(tmp_path)).save(tmp_path / "none")
        assert ap.load(tmp_path / "none").k is None

    def test_can_be_said_of_any_format(self, tmp_path):
        arrays = {
            "W_enc": (D_IN, D_SAE),
            "W_dec": (D_SAE, D_IN),
            "b_enc": (D_SAE,),
            "b_dec": (D_IN,),
            "threshold": (D_SAE,),
        }
        np.savez(tmp_path / "params.npz", **{name: np.ones(shape, np.float32) for name, shape in arrays.items()})
        assert ap.load(tmp_path).k is None and ap.load(tmp_path, config={"k": 7}).k == 7
        assert ap.load(tmp_path, config={"k": np.float32(2.5)}).k == 2.5
        for k in ("many", 0, -1, True, float("nan")):
            with pytest.raises(ValueError, match="no number of active latents"):
                ap.load(tmp_path, config={"k": k})

    def test_numbers_of_numpy(self, tmp_path):
        assert ap.load(write_topk(tmp_path), config={"k": np.int64(3)}).k == 3

    @pytest.mark.parametrize("name", ["relu", "gated", "jumprelu"])
    def test_training_on_holds_the_l0_that_it_has(self, name, tmp_path):
        x = inputs().repeat(60, 1) + 0.3 * rand(660, D_IN, seed=5)
        sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, seed=0, input_norm="none", k=None)
        trainer = ap.Trainer(sae, ap.TrainConfig(lr=1e-3, batch_tokens=len(x)))
        found = [trainer.step(x) for _ in range(60)]
        assert all(step["loss"].isfinite() for step in found)
        first, last = (float(found[i]["l0"]) for i in (0, -1))
        assert abs(last - first) < 0.35 * first, (first, last)
