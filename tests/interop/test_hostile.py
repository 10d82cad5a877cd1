"""Files that are damaged, that lie, or that mean harm, in every format: one ValueError each, and nothing executed.

Every format is written here by formula, so that the file is right but for one thing.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from library_files import wave
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import apportion as ap
from apportion.interop.formats import FORMATS

D, F = 6, 20
HUGE = 10**12

ENC, DEC = wave(F, D, seed=1), wave(F, D, seed=2)
B_ENC, B_DEC, THETA = wave(F, seed=3), wave(D, seed=4), wave(F, seed=5).abs()


@dataclass
class Made:
    """One SAE in one format: files by formula."""

    format: str
    weights: str
    tensors: dict[str, Tensor]
    settings: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()
    """Settings that say how large a tensor is."""
    k: str | None = None
    inside: tuple[str, ...] = ()
    """Where in the config sizes and k are."""
    more: dict[str, Any] = field(default_factory=dict)
    """What the file of weights holds besides tensors."""

    def write(self, folder: Path, tensors: dict[str, Tensor] | None = None, **changed: Any) -> Path:
        file = folder / self.weights
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.clone(memory_format=torch.contiguous_format) for n, t in (tensors or self.tensors).items()}
        if file.suffix == ".safetensors":
            save_file(tensors, file)
        elif file.suffix == ".npz":
            np.savez(file, **{name: t.numpy() for name, t in tensors.items()})
        else:
            torch.save(tensors | self.more, file)
        if self.settings is not None:
            config = json.loads(json.dumps(self.config))
            within = config
            for name in self.inside:
                within = within[name]
            within |= changed
            (folder / self.settings).write_text(json.dumps(config))
        return folder


ROWS = {"encoder.weight": ENC, "encoder.bias": B_ENC}
OURS = {"W_enc": ENC, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC} | {
    "input.mean": wave(D, seed=8),
    "input.scale": torch.tensor(0.5),
}
COLUMNS = {"W_enc": ENC.T, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC}
MADE = {
    made.format + suffix: made
    for suffix, made in [
        ("", Made("sae_lens", "sae_weights.safetensors", COLUMNS, "cfg.json",
                  {"architecture": "topk", "k": 3, "d_in": D, "d_sae": F}, ("d_in", "d_sae"), "k")),
        ("", Made("dictionary_learning", "ae.pt", {**ROWS, "decoder.weight": DEC.T, "bias": B_DEC}, "config.json",
                  {"trainer": {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": F}},
                  ("activation_dim", "dict_size"), None, ("trainer",))),
        ("", Made("sparsify", "sae.safetensors", {**ROWS, "W_dec": DEC, "b_dec": B_DEC}, "cfg.json",
                  {"k": 3, "d_in": D, "num_latents": F}, ("d_in", "num_latents"), "k")),
        ("", Made("openai", "3.pt", {"encoder.weight": ENC, "decoder.weight": DEC.T, "pre_bias": B_DEC,
                                     "latent_bias": B_ENC},
                  more={"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "ReLU"}})),
        ("", Made("gemma_scope", "params.npz", COLUMNS | {"threshold": THETA})),
        ("_2", Made("gemma_scope", "params.safetensors",
                    {**{name.lower(): t for name, t in COLUMNS.items()}, "threshold": THETA}, "config.json",
                    {"architecture": "jump_relu", "width": F}, ("width",))),
        ("", Made("llama_scope", "checkpoints/final.safetensors",
                  {**ROWS, "decoder.weight": DEC.T, "decoder.bias": B_DEC}, "hyperparams.json",
                  {"d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.1,
                   "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 3.0, "out": 3.0}},
                  ("d_model", "d_sae"))),
        ("", Made("llamascopium", "sae_weights.safetensors",
                  {"W_E": ENC.T, "b_E": B_ENC, "W_D": DEC, "b_D": B_DEC}, "config.json",
                  {"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": "topk", "top_k": 3,
                   "norm_activation": "inference", "sparsity_include_decoder_norm": False},
                  ("d_model", "expansion_factor"), "top_k")),
        ("", Made("mlsae", "model.safetensors", {"encoder.weight": ENC, "decoder.weight": DEC.T,
                                                 "pre_encoder_bias": B_DEC},
                  "config.json", {"n_inputs": D, "n_latents": F, "k": 3}, ("n_inputs", "n_latents"), "k")),
        ("", Made("switch_sae", "ae.pt", {"encoder.weight": ENC, "decoder": DEC, "b_dec": B_DEC,
                                          "router.weight": wave(4, D, seed=6), "b_router": wave(D, seed=7)},
                  "config.json", {"trainer": {"activation_dim": D, "dict_size": F, "k": 3, "experts": 4}},
                  ("activation_dim", "dict_size", "experts"), "k", ("trainer",))),
        ("", Made("e2e_sae", "samples_5.pt",
                  {f"blocks-1-hook_resid_pre.{name}": t for name, t in {
                      "encoder.0.weight": ENC, "encoder.0.bias": B_ENC, "decoder.weight": DEC.T,
                      "decoder.bias": B_DEC}.items()})),
        ("", Made("batchtopk_repo", "sae.pt", COLUMNS, "config.json",
                  {"sae_type": "topk", "act_size": D, "dict_size": F, "top_k": 3}, ("act_size", "dict_size"), "top_k")),
        ("", Made("circuit_tracer", "layer_3.safetensors", COLUMNS | {"W_enc": ENC})),
        ("", Made("apportion", "model.safetensors", OURS, "config.json",
                  {"format": "apportion", "version": 1, "sae": "topk", "info": {},
                   "settings": {"d_in": D, "d_sae": F, "k": 3, "input_norm": "dataset", "subtract_b_dec": True,
                                "affinity": "code"}},
                  ("d_in", "d_sae"), "k", ("settings",))),
    ]
}  # fmt: skip
everything = pytest.mark.parametrize("made", MADE.values(), ids=list(MADE))
pickled = pytest.mark.parametrize(
    "made",
    [m for m in MADE.values() if m.weights.endswith(".pt")],
    ids=[n for n in MADE if MADE[n].weights[-3:] == ".pt"],
)
with_settings = pytest.mark.parametrize(
    "made", [m for m in MADE.values() if m.settings], ids=[name for name, m in MADE.items() if m.settings]
)


class Largest(TorchDispatchMode):
    """The most bytes that any tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu":
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def refused(path: Path, made: Made, names: str = "") -> str:
    """One ValueError in one line that speaks of the path, whether the format is told or recognised; its last words."""
    message = ""
    for how in ({}, {"format": made.format}):
        with pytest.raises(ValueError, match=names or None) as raised, Largest() as largest:
            ap.load(path, **how)
        message = str(raised.value)
        assert str(path if path.is_dir() else path.parent) in message and "\n" not in message, message
        assert largest.bytes < 100_000, largest.bytes
    return message


def loads_or_is_refused(path: Path, made: Made) -> None:
    """What a file says may be of no consequence; then the SAE is the right one."""
    try:
        with Largest() as largest:
            sae = ap.load(path, format=made.format)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error), error
    else:
        assert (sae.d_in, sae.d_sae) == (D, F)
        assert torch.isfinite(sae(wave(5, D, seed=9))).all()
    assert largest.bytes < 100_000


def test_every_format_is_here():
    assert {made.format for made in MADE.values()} == {"apportion", *FORMATS}


@everything
def test_the_file_is_right_but_for_one_thing(made, tmp_path):
    made.write(tmp_path)
    for how in ({}, {"format": made.format}):
        sae = ap.load(tmp_path, **how)
        assert (sae.d_in, sae.d_sae) == (D, F)
        assert torch.isfinite(sae(wave(5, D, seed=9))).all()
        assert sae.info.get("format", "apportion") == made.format


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
class TestWeights:
    @everything
    def test_truncated(self, made, tmp_path):
        file = made.write(tmp_path) / made.weights
        whole = file.read_bytes()
        for length in (0, 1, 7, 9, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            refused(tmp_path, made)

    @everything
    def test_something_else(self, made, tmp_path):
        file = made.write(tmp_path) / made.weights
        empty, array = io.BytesIO(), io.BytesIO()
        zipfile.ZipFile(empty, "w").close()
        np.save(array, np.ones(3))
        for content in (
            b"\x00" * 999, bytes(range(256)) * 9, b"{}", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n",
            empty.getvalue(), array.getvalue(), pickle.dumps({"a": 1}), (2**62).to_bytes(8, "little") + b"{}",
            (9).to_bytes(8, "little") + b'{"x": 3} ', b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x80\x04\x8d" + b"\xff" * 8,
        ):  # fmt: skip
            file.write_bytes(content)
            refused(tmp_path, made)

    @pytest.mark.few(6)
    @everything
    def test_a_tensor_is_missing_or_another(self, made, tmp_path):
        for name, tensor in made.tensors.items():
            others = {n: t for n, t in made.tensors.items() if n != name}
            refused(made.write(tmp_path, others), made)
            wrong = [tensor[None], tensor.long(), tensor > 0]
            if tensor.ndim:
                wrong += [torch.cat([tensor, tensor[:1]]), tensor[:0], tensor.sum()]
            if tensor.ndim == 2:
                wrong += [tensor.T, tensor.flatten()]
            for other in wrong:
                refused(made.write(tmp_path, others | {name: other}), made)

    @everything
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_not_finite(self, made, bad, tmp_path):
        for name, tensor in made.tensors.items():
            flawed = tensor.clone(memory_format=torch.contiguous_format)
            flawed.view(-1)[-1] = bad
            refused(made.write(tmp_path, made.tensors | {name: flawed}), made, "NaN or infinity")

    @everything
    def test_a_tensor_too_many(self, made, tmp_path):
        """It would mean something that we ignore."""
        extra = next(iter(made.tensors)).rsplit(".", 2)[0] + ".surprise" if made.format == "e2e_sae" else "surprise"
        refused(made.write(tmp_path, made.tensors | {extra: torch.ones(2)}), made, "surprise")

    def test_arrays_that_claim_a_size(self, tmp_path):
        made = MADE["gemma_scope"]
        made.write(tmp_path)
        with zipfile.ZipFile(tmp_path / made.weights) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        true = f"({D}, {F})".encode()
        lie = f"({D}, {HUGE})".encode()
        header = entries["W_enc.npy"]
        entries["W_enc.npy"] = header.replace(true + b", }" + b" " * (len(lie) - len(true)), lie + b", }")
        assert len(entries["W_enc.npy"]) == len(header) and lie in entries["W_enc.npy"]
        with zipfile.ZipFile(tmp_path / made.weights, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        assert "claims" in refused(tmp_path, made)

    @pytest.mark.parametrize("name", ["gemma_scope", "openai"])
    def test_an_archive_that_would_fill_the_memory(self, name, tmp_path):
        """Zeros compress to nothing."""
        made = MADE[name]
        file = made.write(tmp_path) / made.weights
        with zipfile.ZipFile(file) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, content in entries.items():
                archive.writestr(entry, content)
            archive.writestr(next(iter(entries)).split("/")[0] + "/data/99", bytes(30_000_000))
        assert file.stat().st_size < 100_000
        assert "unpacked" in refused(tmp_path, made)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def bombs(made: Made, marker: Path) -> Iterator[bytes]:
    """Contents of a file of weights that run a command where unpickling is careless."""
    bomb = Bomb(marker)
    for content in (
        made.tensors | made.more | {"x": bomb},
        made.tensors | made.more | {"x": [{"y": (bomb,)}]},
        bomb,
        [bomb],
    ):
        for zipped in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=zipped)
            yield stream.getvalue()
        yield pickle.dumps(content, protocol=2)
    stream = io.BytesIO()
    torch.save(made.tensors | made.more, stream)
    for name in ("data.pkl", "deeper/data.pkl", "constants.pkl", "code/x.py", "deeper.pt"):
        nested = io.BytesIO(stream.getvalue())
        with zipfile.ZipFile(nested, "a") as archive, warnings.catch_warnings(action="ignore"):
            folder = archive.namelist()[0].split("/")[0]
            code = f"import os\nos.system('touch {marker}')".encode()
            archive.writestr(f"{folder}/{name}", code if name.endswith(".py") else pickle.dumps(bomb))
        yield nested.getvalue()
    array = io.BytesIO()
    np.savez(
        array, **{n.replace(".", "_"): t.numpy() for n, t in made.tensors.items()}, x=np.array([bomb], dtype=object)
    )
    yield array.getvalue()
    names = {name: np.array([bomb], dtype=object) for name in made.tensors}
    array = io.BytesIO()
    np.savez(array, **names)
    yield array.getvalue()


@everything
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_executed(made, tmp_path):
    marker, folder = tmp_path / "executed", tmp_path / "sae"
    file = made.write(folder) / made.weights
    for content in bombs(made, marker):
        file.write_bytes(content)
        for how in ({}, *({"format": name} for name in FORMATS)):
            for path in (folder, file):
                try:
                    ap.load(path, **how)
                except ValueError as error:
                    assert str(folder) in str(error)
                assert not marker.exists()


@pickled
def test_a_bomb_is_named_as_such(made, tmp_path):
    folder = tmp_path / "sae"
    made.write(folder)
    torch.save(made.tensors | made.more | {"x": Bomb(tmp_path / "executed")}, folder / made.weights)
    assert "trust=True" in refused(folder, made, "would execute code")
    assert not (tmp_path / "executed").exists()


LIES = [HUGE, -1, 0, 2.5, "16", True, [], {}, float("nan"), float("inf"), 10**400]


class TestSettings:
    @with_settings
    def test_sizes_that_are_not_true(self, made, tmp_path):
        for name in made.sizes:
            for lie in (HUGE, F + 1, 2 * D, 10**400):
                refused(made.write(tmp_path, **{name: lie}), made)
            for lie in (None, *LIES):
                loads_or_is_refused(made.write(tmp_path, **{name: lie}), made)

    @with_settings
    def test_numbers_of_active_latents_that_cannot_be(self, made, tmp_path):
        if made.k is None:
            return
        for lie in (-1, 0, 2.5, "16", [], {}, float("nan"), float("inf")):
            refused(made.write(tmp_path, **{made.k: lie}), made)
        for lie in (None, *LIES):
            loads_or_is_refused(made.write(tmp_path, **{made.k: lie}), made)

    @pytest.mark.few(1)
    @with_settings
    def test_any_setting_can_be_anything(self, made, tmp_path):
        within = made.config
        for name in made.inside:
            within = within[name]
        for name in [*within, "metadata", "normalize_activations", "activation_fn_kwargs", "hook_name", "hook_point_in",
                     "model_name", "lm_name", "hook_point", "l0", "hf_hook_point_in"]:  # fmt: skip
            for lie in (None, *LIES):
                loads_or_is_refused(made.write(tmp_path, **{name: lie}), made)

    @with_settings
    def test_junk_instead_of_json(self, made, tmp_path):
        file = made.write(tmp_path) / made.settings
        for junk in (b"", b"\x00" * 99, b"\xff\xfe\x00", b"[1, 2]", b"null", b'"x"', b"3", b'{"d_in": ', b"[" * 100_000,
                     b'{"a":' * 100_000, b'{"x": ' + b"9" * 10_000 + b"}", b"\x80\x04K\x01."):  # fmt: skip
            file.write_bytes(junk)
            if made.format in ("dictionary_learning", "switch_sae"):  # they can do without
                loads_or_is_refused(tmp_path, made)
            else:
                refused(tmp_path, made)

    @with_settings
    def test_a_folder_instead_of_settings(self, made, tmp_path):
        file = made.write(tmp_path) / made.settings
        file.unlink()
        file.mkdir()
        if made.format in ("dictionary_learning", "switch_sae", "gemma_scope"):
            loads_or_is_refused(tmp_path, made)
        else:
            refused(tmp_path, made)

    def test_junk_instead_of_yaml(self, tmp_path):
        made = MADE["e2e_sae"]
        file = made.write(tmp_path) / "final_config.yaml"
        for junk in (b"\xff\xfe\x00", b"tlens_model_name: [", b"!!python/object/apply:os.system ['touch executed']"):
            file.write_bytes(junk)
            loads_or_is_refused(tmp_path, made)
        assert not Path("executed").exists()


class TestPaths:
    @everything
    def test_a_folder_instead_of_weights(self, made, tmp_path):
        file = made.write(tmp_path) / made.weights
        file.unlink()
        file.mkdir()
        refused(tmp_path, made)

    @everything
    def test_an_empty_folder(self, made, tmp_path):
        refused(tmp_path, made)

    @everything
    def test_no_weights(self, made, tmp_path):
        (made.write(tmp_path) / made.weights).unlink()
        refused(tmp_path, made)

    @everything
    def test_a_file_that_is_nothing_of_the_kind(self, made, tmp_path):
        (tmp_path / "notes.txt").write_text("Nothing.")
        refused(tmp_path / "notes.txt", made)

    @everything
    def test_a_path_that_climbs_out(self, made, tmp_path):
        made.write(tmp_path / "secret")
        (tmp_path / "here" / "a").mkdir(parents=True)
        for subfolder in ("../secret", "..", "a/../../secret", str(tmp_path / "secret"), "/"):
            for how in ({}, {"format": made.format}):
                with pytest.raises(ValueError, match="leads out of"):
                    ap.load(tmp_path / "here", subfolder=subfolder, **how)

    @everything
    def test_a_link_that_leads_out(self, made, tmp_path):
        made.write(tmp_path / "secret")
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "link").symlink_to(tmp_path / "secret", target_is_directory=True)
        for subfolder in ("link", "link/../link"):
            with pytest.raises(ValueError, match=r"leads out of .*link"):
                ap.load(tmp_path / "here", subfolder=subfolder)

    @everything
    def test_links_that_lead_nowhere(self, made, tmp_path):
        file = made.write(tmp_path) / made.weights
        for target in (tmp_path / "nowhere", file, tmp_path):
            file.unlink()
            file.symlink_to(target)
            refused(tmp_path, made)
