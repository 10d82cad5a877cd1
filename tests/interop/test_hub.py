"""SAEs from the Hub and onto it, against a server on this machine (hub_server.py says what it simulates)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Hub, Repo
from library_files import wave
from naive import D_IN, D_SAE, assert_computes, inputs
from safetensors.torch import save

import apportion as ap
from apportion.interop.hub import download, select
from apportion.interop.releases import RELEASES, closest, place_in

constants = pytest.importorskip("huggingface_hub.constants")
utils = pytest.importorskip("huggingface_hub.utils")

W_ENC, W_DEC = wave(D_IN, D_SAE, seed=1), wave(D_SAE, D_IN, seed=2)
B_ENC, B_DEC = wave(D_SAE, seed=3, size=0.1), wave(D_IN, seed=4, size=0.1)
NOWHERE = "http://127.0.0.1:9"
"""Nobody listens there."""


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def forget_sessions() -> None:
    """Before version 1, huggingface_hub looks only when it opens a session whether it is to be offline."""
    getattr(utils, "reset_sessions", lambda: None)()


def go_offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()


@pytest.fixture
def hub(server, monkeypatch, tmp_path) -> Iterator[Hub]:
    """A Hub without repositories, an empty cache, and nobody's own login."""
    server.repos, server.asked, server.cut = {}, [], None
    for name, value in {"HF_ENDPOINT": server.url, "HF_TOKEN": "nobody", "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    forget_sessions()


def sae_lens(**settings: object) -> dict[str, bytes]:
    """The files of a SAELens SAE, of those before version 6."""
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "activation_fn_str": "relu", "prepend_bos": True}
    weights = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    return {"cfg.json": json.dumps(config | settings).encode(), "sae_weights.safetensors": save(weights)}


def assert_is_the_sae(sae: ap.SAE, threshold: float = 0.0, subtract: bool = True, centred: bool = False) -> None:
    """`centred`: it was trained where tokens have a mean of 0 over the width."""
    x = inputs()
    seen = x - x.mean(1, keepdim=True) if centred else x
    a = (seen - B_DEC * subtract) @ W_ENC + B_ENC
    z = a.relu() * (a > threshold)
    assert_computes(sae, x, z, z @ W_DEC + B_DEC)


def within(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def gemma_scope(tmp_path: Path, threshold: float) -> dict[str, bytes]:
    file = tmp_path / "params.npz"
    theta = np.full(D_SAE, threshold, dtype=np.float32)
    np.savez(file, W_enc=W_ENC, W_dec=W_DEC, b_enc=B_ENC, b_dec=B_DEC, threshold=theta)
    return {"params.npz": file.read_bytes()}


class TestDownload:
    def test_only_what_belongs_to_the_sae_is_fetched(self, hub):
        files = within("b/one", sae_lens()) | within("b/two", sae_lens()) | within("b/one/deeper", sae_lens())
        more = ["README.md", "b/config.json", "b/other.json", "b/one/trainer_state.pt", "b/one/sparsity.safetensors",
                "b/one/optimizer_0.pt", "b/one/notes.txt", "b/one/run.yaml"]  # fmt: skip
        hub.repos["org/name"] = Repo(files | {name: json.dumps({"of": name}).encode() for name in more})
        for subfolder in ("b/one", "b/one/", "./b/../b/one"):
            assert_is_the_sae(ap.load("org/name", subfolder=subfolder))
        wanted = {"b/one/cfg.json", "b/one/sae_weights.safetensors", "b/one/run.yaml", "b/config.json"}
        assert hub.files_fetched() == wanted

    def test_nothing_is_fetched_twice(self, hub):
        hub.repos["org/name"] = Repo(sae_lens())
        ap.load("org/name")
        hub.asked.clear()
        assert_is_the_sae(ap.load("org/name"))
        assert hub.asked and not hub.files_fetched()

    def test_a_file(self, hub):
        hub.repos["org/name"] = Repo(within("a", sae_lens()))
        assert_is_the_sae(ap.load("org/name", "a/sae_weights.safetensors"))

    def test_settings_above_tell_the_hookpoint(self, hub):
        weights = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
        config = {"activation": "topk", "k": D_SAE, "d_in": D_IN, "num_latents": D_SAE}
        files = {"cfg.json": json.dumps(config).encode(), "sae.safetensors": save(weights)}
        run = {"config.json": b'{"model": "EleutherAI/pythia-160m"}'}
        hub.repos["EleutherAI/sae-pythia-160m-32x"] = Repo(within("layers.8", files) | run)
        sae = ap.load("EleutherAI/sae-pythia-160m-32x", subfolder="layers.8")
        assert_is_the_sae(sae)
        assert sae.hookpoint == "gpt_neox.layers.8"

    def test_another_revision(self, hub):
        hub.repos["org/name"] = Repo(sae_lens(), revisions=("main", "v2"))
        assert (download("org/name", revision="v2") / "cfg.json").is_file()

    def test_without_a_network_the_cache_is_used(self, hub, monkeypatch):
        hub.repos["org/name"] = Repo(within("a", sae_lens()) | within("b", sae_lens()))
        ap.load("org/name", "a")
        monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
        assert_is_the_sae(ap.load("org/name", "a"))
        with pytest.raises(ValueError, match=r"out of reach.*In the cache: org/name/b does not exist.*in: a"):
            ap.load("org/name", "b")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        go_offline(monkeypatch)
        hub.asked.clear()
        assert_is_the_sae(ap.load("org/name", "a"))
        assert not hub.asked

    def test_a_hub_that_is_not_well(self, hub):
        hub.repos["org/name"] = Repo(sae_lens())
        ap.load("org/name")
        hub.repos["org/name"].refused = (503, "Busy")
        assert_is_the_sae(ap.load("org/name"))

    def test_names_that_climb_out_are_not_fetched(self, hub, tmp_path):
        weights = sae_lens()["sae_weights.safetensors"]
        hub.repos["org/name"] = Repo({"../../../evil.safetensors": weights, "/evil.safetensors": weights})
        with pytest.raises(ValueError, match="org/name holds no weights"):
            ap.load("org/name")
        assert not hub.files_fetched() and not list(tmp_path.rglob("evil*"))


REFUSED = {
    "gated": ((403, "GatedRepo"), r"org/name is gated\. Accept its conditions at http.*/org/name, and log in"),
    "private": ((401, "RepoNotFound"), r"has no repository org/name, or it is private.*HF_TOKEN"),
    "missing": ((404, "RepoNotFound"), r"has no repository org/name"),
    "forbidden": ((403, "Forbidden"), r"does not let you do that in org/name \(403\)"),
    "odd": ((418, "Teapot"), r"org/name: http.* answered 418"),
    "down": ((503, "Busy"), r"org/name: http.* is out of reach.*503"),
}  # fmt: skip


class TestMistakes:
    @pytest.mark.parametrize(("answer", "message"), REFUSED.values(), ids=list(REFUSED))
    def test_what_the_hub_refuses(self, answer, message, hub):
        hub.repos["org/name"] = Repo(sae_lens(), refused=answer)
        assert_refused(message, "org/name")

    def test_what_is_not_there(self, hub):
        hub.repos["org/name"] = Repo(within("a", sae_lens()))
        assert_refused("has no repository org/other", "org/other")
        assert_refused(r"org/name/c does not exist\. There are weights in: a\.", "org/name", "c")
        with pytest.raises(ValueError, match="org/name has no revision 'v9'"):
            download("org/name", "a", revision="v9")

    def test_no_network(self, hub, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
        before = time.monotonic()
        assert_refused(rf"org/name: {NOWHERE} is out of reach, and the files are not in the cache", "org/name")
        assert time.monotonic() - before < 5, "it does not try again and again"

    def test_offline_by_choice(self, hub, monkeypatch):
        go_offline(monkeypatch)
        assert_refused("not in the cache.*HF_HUB_OFFLINE", "org/name")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert_refused(r"pip install .*\[hub\]", "org/name")

    @pytest.mark.parametrize("subfolder", ["..", "../x", "a/../../x", "/etc", "..\\x"])
    def test_a_subfolder_that_climbs_out(self, subfolder, hub):
        assert_refused(r"leads out of org/name", "org/name", subfolder)
        assert not hub.asked

    def test_a_name_that_is_nothing(self, hub):
        assert_refused(r"no release, such as .*gpt2-small-res-jb", "gpt2-small-res-j")
        assert not hub.asked

    def test_damage_on_the_way_is_found(self, hub):
        files = sae_lens()
        hub.repos["org/name"] = Repo(files | {"sae_weights.safetensors": files["sae_weights.safetensors"][:-40]})
        assert_refused(r"sae_weights\.safetensors is damaged", "org/name")


def assert_refused(message: str, *where: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        ap.load(*where)
    assert "\n" not in str(raised.value)


class TestSelect:
    def test_llama_scope_keeps_weights_deeper(self):
        each = ("hyperparams.json", "lm_config.json", "checkpoints/final.safetensors")
        names = [f"L{i}R/{file}" for i in (1, 11) for file in each]
        wanted = ["L1R/checkpoints/final.safetensors", "L1R/hyperparams.json", "L1R/lm_config.json"]
        assert select("org/name", names, "L1R") == ("L1R", wanted)
        place = "L1R/checkpoints"
        assert sorted(select("org/name", names, place)[1]) == wanted

    def test_checkpoints_of_a_run_need_the_settings_above(self):
        names = ["t/ae.pt", "t/config.json", "t/checkpoints/ae_10.pt", "t/checkpoints/ae_20.pt", "u/config.json"]
        assert select("org/name", names, "t")[1] == ["t/ae.pt", "t/config.json"]
        place = "t/checkpoints/ae_20.pt"
        assert select("org/name", names, place) == (place, [place, "t/config.json"])

    def test_several_saes_are_not_fetched_together(self):
        names = [f"layer_{i}/width_16k/average_l0_{j}/params.npz" for i in range(26) for j in (20, 80)]
        with pytest.raises(
            ValueError, match=r"org/name holds SAEs in 52 folders.*subfolder.*layer_0/width_16k/average"
        ):
            select("org/name", names, "")
        with pytest.raises(ValueError, match=r"org/name/layer_3 holds SAEs in 2 folders"):
            select("org/name", names, "layer_3")
        with pytest.raises(ValueError, match=r"org/name holds 12 files of weights\. Say which.*layer0\.sae\.pt"):
            select("org/name", [f"layer{i}.sae.pt" for i in range(12)], "")

    def test_no_weights(self):
        with pytest.raises(ValueError, match="org/name holds no weights"):
            select("org/name", ["README.md"], "")
        with pytest.raises(ValueError, match="org/name/a holds no weights"):
            select("org/name", ["a/README.md", "b/ae.pt"], "a")
        with pytest.raises(ValueError, match=r"org/name has no layer_1/average_l0_\*"):
            select("org/name", ["layer_2/average_l0_3/params.npz"], "layer_1/average_l0_*")


FACTS = [
    ("gpt2-small-res-jb", "blocks.8.hook_resid_pre",
     "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre"),
    ("gpt2-small-resid-post-v5-32k", "blocks.11.hook_resid_post",
     "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", "v5_32k_layer_11.pt"),
    ("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_pre",
     "ctigges/pythia-70m-deduped__res-sm_processed", "e-res-sm"),
    ("pythia-70m-deduped-mlp-sm", "blocks.5.hook_mlp_out",
     "ctigges/pythia-70m-deduped__mlp-sm_processed", "5-mlp-sm"),
    ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71",
     "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
    ("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical",
     "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_*"),
    ("gemma-scope-2-270m-it-res-all", "layer_9_width_262k_l0_small",
     "google/gemma-scope-2-270m-it", "resid_post_all/layer_9_width_262k_l0_small"),
    ("gemma-scope-2-1b-pt-transcoders", "transcoder/layer_7_width_65k_l0_small_affine",
     "google/gemma-scope-2-1b-pt", "transcoder/layer_7_width_65k_l0_small_affine"),
    ("llama_scope_lxm_8x", "l31m_8x", "fnlp/Llama3_1-8B-Base-LXM-8x", "Llama3_1-8B-Base-L31M-8x"),
    ("llama_scope_r1_distill", "l14r_800m_openr1_math",
     "fnlp/Llama-Scope-R1-Distill", "0-Slimpajama-800M-OpenR1-Math-220k/L14R"),
]  # fmt: skip


class TestReleases:
    @pytest.mark.parametrize(("release", "sae", "repo", "path"), FACTS)
    def test_rules(self, release, sae, repo, path):
        assert place_in(release, sae) == (repo, path)

    @pytest.mark.parametrize("sae", [None, "", "8", "blocks.x.hook_resid_pre", "blocks.8.hook_mlp_out", "../secret"])
    def test_a_name_outside_the_rules(self, sae):
        with pytest.raises(ValueError, match=r"gpt2-small-res-jb (is a|has no).*blocks\.\{layer\}\.hook_resid_pre"):
            place_in("gpt2-small-res-jb", sae)

    def test_no_rule_leads_out(self):
        for name, release in RELEASES.items():
            assert "/" not in name and release.repo.count("/") == 1
            for rule in release.places:
                sae = rule.format(layer=3, l0=40, width="16k", trainer=1)
                repo, path = place_in(name, sae)
                assert repo == release.repo and not set("{}") & set(path) and ".." not in path

    def test_canonical_is_closest_to_100(self):
        folders = [f"layer_12/width_16k/average_l0_{n}" for n in (22, 82, 176, 445)] + [
            "layer_12/width_65k/average_l0_99"
        ]
        assert closest("layer_12/width_16k/average_l0_*", folders) == folders[1]
        assert closest("layer_3/width_16k/average_l0_*", folders) is None

    def test_through_a_release(self, hub):
        name = "blocks.8.hook_resid_pre"
        config = sae_lens(hook_name=name, model_name="gpt2-small")
        hub.repos["jbloom/GPT2-Small-SAEs-Reformatted"] = Repo(within(name, config) | within(f"x/{name}", config))
        sae = ap.load("gpt2-small-res-jb", name)
        assert_is_the_sae(sae, centred=True)
        assert sae.hookpoint == "transformer.h.8:in"

    def test_through_a_canonical_name(self, hub, tmp_path):
        files = {}
        for l0, threshold in ((10, 2.0), (95, 0.5), (300, 0.1)):
            files |= within(f"layer_12/width_16k/average_l0_{l0}", gemma_scope(tmp_path, threshold))
        hub.repos["google/gemma-scope-2b-pt-res"] = Repo(files)
        sae = ap.load("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
        assert_is_the_sae(sae, threshold=0.5, subtract=False)
        assert sae.hookpoint == "model.layers.12"
        assert hub.files_fetched() == {"layer_12/width_16k/average_l0_95/params.npz"}


def trained() -> ap.SAE:
    """A Mutual Choice SAE that says where it comes from."""
    sae = ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=3, seed=0)
    x = inputs().repeat(20, 1)
    trainer = ap.Trainer(sae, ap.TrainConfig(batch_tokens=len(x)))
    for _ in range(3):
        trainer.step(x)
    sae.calibrate(x)
    sae.info["source"] = {
        "folder": "/home/me/acts",
        "folders": ["/home/me/acts"],
        "model": {"name_or_path": "openai-community/gpt2"},
        "hookpoint": "transformer.h.8",
        "text": {"where": "/home/me/corpus.txt"},
        "rows": 12345,
        "filter": {"special_tokens": True, "norm_outlier": 10.0},
        "filtered_share": 0.01,
    }
    sae.info["training"] = {"lr": 0.003, "batch_tokens": 220, "tokens": 660, "clip_ratio": None}
    return sae.eval()


FIGURES = {
    "mode": "eval (thresholds)",
    "tokens": 1000,
    "filtered_share": 0.01,
    "fvu": 0.25,
    "l0": 2.98,
    "dead": 0.05,
    "delta_ce": 0.31,
    "l0_quantiles": {"50%": 3.0},
    "my_figure": 7.5,
    "zipf": None,
}


class TestPush:
    def test_what_is_pushed_loads_again_with_identical_numbers(self, hub):
        sae, x = trained(), inputs()
        address = ap.push_to_hub(sae, "me/my-sae", private=True)
        repo = hub.repos["me/my-sae"]
        assert address == f"{hub.url}/me/my-sae" and repo.private and len(repo.commits) == 1
        assert set(repo.files) == {"config.json", "model.safetensors", "README.md"}
        again = ap.load("me/my-sae")
        assert torch.equal(again(x), sae(x)) and torch.equal(again.encode(x).dense(), sae.encode(x).dense())
        assert again.hookpoint == sae.hookpoint == "transformer.h.8"
        ap.push_to_hub(sae, "me/my-sae")
        assert len(repo.commits) == 2, "a repository that is there gets another commit"

    def test_the_card(self, hub, tmp_path):
        (tmp_path / "figures.json").write_text(json.dumps(FIGURES))
        (tmp_path / "plots").mkdir()
        for name in ("density.png", "l0 curve.svg", "raw.csv"):
            (tmp_path / "plots" / name).write_bytes(b"image")
        ap.push_to_hub(
            trained(), "me/saes", subfolder="layer-8", metrics=tmp_path / "figures.json", plots=tmp_path / "plots",
            license="mit", notes="Trained for fun.",
        )  # fmt: skip
        files = hub.repos["me/saes"].files
        images = {"layer-8/plots/density.png", "layer-8/plots/l0 curve.svg"}
        assert set(files) == {f"layer-8/{f}" for f in ("config.json", "model.safetensors", "README.md")} | images
        card = files["layer-8/README.md"].decode()
        for words in (
            'license: "mit"',
            'base_model: "openai-community/gpt2"',
            "kind `mutual_choice`",
            "Trained for fun.",
            'ap.load("me/saes", subfolder="layer-8")',
            "| hookpoint | `transformer.h.8` |",
            "| latents (d_sae) | 20 |",
            "calibrated on 220 tokens",
            "| text | corpus.txt |",
            "| tokens in the cache | 12,345 |",
            "| tokens filtered out | 1.00% |",
            "| `lr` | 0.003 |",
            "1,000 tokens, eval (thresholds), 1.00% of tokens filtered out",
            "| FVU | 0.2500 | fraction of variance unexplained",
            "| ΔCE | +0.3100 | ",
            "| dead | 5.00% | share of latents",
            "Given without a definition:",
            "| `my_figure` | 7.5 |",
            "](plots/density.png)",
            "](plots/l0%20curve.svg)",
        ):
            assert words in card, words
        assert "None" not in card and "clip_ratio" not in card
        assert torch.equal(ap.load("me/saes", "layer-8")(inputs()), trained()(inputs()))

    def test_a_card_of_an_sae_that_says_nothing(self, hub):
        sae = ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=3, input_norm="token_standardise", seed=0)
        ap.push_to_hub(sae, "me/bare")
        card = hub.repos["me/bare"].files["README.md"].decode()
        assert "None was given" in card and "license:" not in card and "base_model" not in card
        assert "sae.decode(latents, x)" in card
        for section in ("## Data", "## Training", "## Metrics", "## Plots", "| hookpoint"):
            assert section not in card

    def test_folders_of_this_machine_stay_here(self, hub):
        sae = trained()
        ap.push_to_hub(sae, "me/my-sae")
        for content in hub.repos["me/my-sae"].files.values():
            assert b"/home/me" not in content
        assert sae.info["source"]["folder"] == "/home/me/acts"

    def test_an_sae_that_nobody_could_use_is_refused(self, hub):
        bare = ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=3, input_norm="none", seed=0)
        with pytest.raises(ValueError, match=r"no thresholds yet.*sae\.calibrate"):
            ap.push_to_hub(bare, "me/x")
        assert bare.training
        with pytest.raises(ValueError, match=r"no input description yet.*fit_input"):
            ap.push_to_hub(ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=3, seed=0), "me/x")
        broken = trained()
        with torch.no_grad():
            broken.b_dec[2] = torch.nan
        with pytest.raises(ValueError, match="b_dec holds NaN"):
            ap.push_to_hub(broken, "me/x")
        assert not hub.asked

    def test_mistakes(self, hub, monkeypatch, tmp_path):
        sae = trained()
        (tmp_path / "table.csv").write_text("")
        with pytest.raises(ValueError, match=r"plots: .*table\.csv is not an image"):
            ap.push_to_hub(sae, "me/x", plots=[tmp_path / "table.csv"])
        with pytest.raises(ValueError, match="leads out of me/x"):
            ap.push_to_hub(sae, "me/x", subfolder="../y")
        with pytest.raises(ValueError, match="is no name of a repository"):
            ap.push_to_hub(sae, "me/x/y")
        assert not hub.asked
        hub.repos["me/x"] = Repo({}, refused=(403, "Forbidden"))
        with pytest.raises(ValueError, match=r"does not let you do that in me/x \(403\)\. Log in"):
            ap.push_to_hub(sae, "me/x")
        monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
        with pytest.raises(ValueError, match="is out of reach"):
            ap.push_to_hub(sae, "me/x")
