from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make

from apportion.about import About
from apportion.language import collect as collect_module
from apportion.language.collect import collect
from apportion.language.fingerprint import PROBE_TOKENS
from apportion.language.hookpoints import capture, hooked
from apportion.language.model import load_model, run_contexts
from apportion.language.tokens import read_contexts
from apportion.rows import writer as writer_module
from apportion.rows.filter import TokenFilter, row_norms
from apportion.rows.store import ActivationStore

TEXT = ["the cat sat on the mat and looked at the dog by the sea " * 6, "she read a book about ships " * 20]
OUT, MLP = "model.layers.1", "model.layers.0.mlp:in"


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


def tiny_collect(lm: tuple[Any, Any], out: Path, hookpoints: Any = OUT, **settings: Any) -> dict[str, Any]:
    return collect(
        *lm, hookpoints, TEXT, out=out, **{"tokens": 160, "context_tokens": 8, "batch_contexts": 3} | settings
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_the_models_activations_in_the_chosen_dtype(
    lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 57)  # shards of two batches
    manifest = tiny_collect(lm, tmp_path / "acts", [OUT, MLP], dtype=dtype)
    assert [shard["rows"] for shard in manifest["shards"]] == [48, 48, 48, 16]
    assert not manifest["text_ended_early"]
    model, tokenizer = lm
    ids = read_contexts(tokenizer, TEXT, tokens=160, context_tokens=8)
    batches = [capture(model, [OUT, MLP], chunk.long(), use_cache=False) for chunk in ids.split(3)]
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    for name in (OUT, MLP):
        expected = torch.cat([b[name].flatten(0, 1) for b in batches]).to(getattr(torch, dtype)).float()
        store = ActivationStore(tmp_path / "acts", name)
        assert (store.rows, store.d_in) == (160, 32)
        assert torch.equal(store.gather(order), expected[order])
        assert torch.equal(store.tokens, ids.flatten())
        assert torch.equal(store.positions, torch.arange(8).repeat(20))
        assert torch.equal(store.contexts, torch.arange(20).repeat_interleave(8))
        assert torch.equal(store.gather_labels(order)[0], store.tokens[order])
        assert torch.equal(store.mask, store.filter.mask(expected, store.tokens, store.positions))
        assert store.filter.median_norm is not None
        about = store.describe()
        assert sum(about.filtered.values()) == int((~store.mask).sum()) == round(about.filtered_share * 160)
        assert about.mean_norm == pytest.approx(float(row_norms(expected)[store.mask].mean()))
        assert About.from_json(json.loads(json.dumps(about.to_json()))) == about
        assert about.lm.model.num_layers == 3


def test_what_a_router_returns_beside_its_logits_is_collected(tmp_path: Path) -> None:
    """With transformers 4 the block of experts returns the logits of its router, with 5 the router its choice."""
    model = make("olmoe")
    returned: list[Any] = []
    mlp = model.model.layers[1].mlp
    tupled = mlp if not hasattr(mlp.gate, "top_k") else mlp.gate
    name = next(n for n, m in model.named_modules() if m is tupled)
    handle = tupled.register_forward_hook(lambda module, args, result: returned.append(result[1]))
    ids = torch.arange(3, 43).view(5, 8)
    model(ids)
    handle.remove()
    place = f"{name}:out[1]"
    collect(model, None, f"{name.replace('1', '*', 1)}:out[1]", ids, tokens=40, context_tokens=8, batch_contexts=5,
            out=tmp_path / "acts", dtype="float32")  # fmt: skip
    store = ActivationStore(tmp_path / "acts", place)
    assert (store.d_in, store.rows) == (returned[0].shape[1], 40)
    assert torch.allclose(store.gather(torch.arange(40)), returned[0], atol=1e-6)
    assert (tmp_path / "acts" / f"{name}--out[1]").is_dir()
    for wrong, said in [("model.layers.1.mlp.gate:out[9]", "does not exist"), ("model.layers.1:in[1]", "no tensor")]:
        with pytest.raises(ValueError, match=said):
            collect(model, None, wrong, ids, tokens=40, context_tokens=8, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_whole_numbers_are_no_activations() -> None:
    class Ranks(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return torch.zeros(*input_ids.shape, 4), torch.zeros(*input_ids.shape, 2, dtype=torch.int64)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ranks, self.linear = Ranks(), torch.nn.Linear(1, 1)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.ranks(input_ids)

    ids = torch.zeros(1, 2, dtype=torch.int64)
    assert run_contexts(Model(), ["ranks"], ids)["ranks"].shape == (2, 4)
    with pytest.raises(ValueError, match=r"'ranks:out\[1\]' carries whole numbers"):
        run_contexts(Model(), ["ranks:out[1]"], ids)


def test_the_head_and_upper_layers_are_hardly_ever_computed(lm: tuple[Any, Any], tmp_path: Path) -> None:
    """Once to try whether the model runs the hookpoints once, and once to recognise the model again."""
    calls: list[int] = []
    looks = dict.fromkeys(("model.layers.2:in", "lm_head:in"), lambda x: calls.append(x.shape[:-1].numel()))
    with hooked(lm[0], looks):
        tiny_collect(lm, tmp_path / "acts")
    assert calls == [4, 4, PROBE_TOKENS, PROBE_TOKENS]


def test_a_changed_file_is_found(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny_collect(lm, tmp_path / "acts")
    store = ActivationStore(tmp_path / "acts")
    store.verify()
    file = tmp_path / "acts" / OUT / "00000.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1000] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged: model\.layers\.1/00000\.safetensors"):
        store.verify()
    file.unlink()
    with pytest.raises(ValueError, match="damaged"):
        ActivationStore(tmp_path / "acts")


def test_a_collection_that_fails_before_its_first_shard_leaves_nothing(
    lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = collect_module.run_contexts, 0

    def interrupted(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            assert [p.name for p in tmp_path.iterdir()] == ["acts"]
            raise RuntimeError("a failure")
        return run(*args, **settings)

    monkeypatch.setattr(collect_module, "run_contexts", interrupted)
    with pytest.raises(RuntimeError, match="a failure"):
        tiny_collect(lm, tmp_path / "acts")
    assert not list(tmp_path.iterdir())


def test_nan_names_token_context_and_position(lm: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = lm
    ids = read_contexts(tokenizer, TEXT, tokens=160, context_tokens=8)
    ships = int(tokenizer.convert_tokens_to_ids("ships"))
    context, position = (ids == ships).nonzero()[0].tolist()
    assert context >= 3  # not in the first batch
    seen: list[torch.Tensor] = []

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill((seen[-1] == ships)[..., None], float("nan"))

    with (
        hooked(model, {"model.embed_tokens:in": seen.append, OUT: poison}),
        pytest.raises(ValueError, match=rf"'model\.layers\.1'.*'ships', context {context}, position {position}:"),
    ):
        tiny_collect(lm, tmp_path / "acts")
    assert not list(tmp_path.iterdir())


def test_overflow_of_the_stored_dtype_is_found(lm: tuple[Any, Any], tmp_path: Path) -> None:
    with (
        hooked(lm[0], {OUT: lambda x: x * 1e6}),
        pytest.raises(ValueError, match="store in bfloat16 or float32"),
    ):
        tiny_collect(lm, tmp_path / "acts", dtype="float16")


def test_rows_of_the_text_that_were_left_out_are_said(
    lm: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text, said in (("good", TEXT, 0), ("broken", [None, *TEXT], 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            manifest = collect(*lm, OUT, text, out=tmp_path / name, tokens=40, context_tokens=8)
        assert sum(manifest["text_skipped"].values()) == len(caplog.records) == said
    assert "1 null (first: document 1)" in caplog.text


def test_a_text_that_ends_early_is_collected_and_reported(
    lm: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = tiny_collect(lm, tmp_path / "acts", tokens=100_000)
    assert manifest["text_ended_early"]
    assert 0 < manifest["rows"] < 100_000
    assert f"ended after {manifest['rows']} of the 100000" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_tokens": 65}, "more than the 64 positions"),
        ({"dtype": "int4"}, "'int4' is not supported"),
        ({"tokens": 0}, "tokens=0"),
        ({"batch_contexts": 0}, "batch_contexts=0"),
        ({"hookpoints": "model.layers.9"}, r"no module 'model\.layers\.9'"),
        ({"bos": "perhaps"}, "'perhaps'"),
    ],
)
def test_wrong_requests_fail_before_any_forward_pass(
    lm: tuple[Any, Any], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    calls: list[int] = []
    with hooked(lm[0], {"model.layers.0": lambda _: calls.append(1)}), pytest.raises(ValueError, match=message):
        tiny_collect(lm, tmp_path / "acts", **settings)
    assert not calls
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_but_an_empty_one_is_not(lm: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    tiny_collect(lm, tmp_path / "acts")
    before = (tmp_path / "acts" / "manifest.json").read_text()
    with pytest.raises(ValueError, match="exists already"):
        tiny_collect(lm, tmp_path / "acts")
    assert (tmp_path / "acts" / "manifest.json").read_text() == before


def test_a_full_disk_is_foreseen(lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"needs 12\.8 kB but its disk has 1\.0 kB free"):
        tiny_collect(lm, tmp_path / "acts")


def test_a_hookpoint_without_one_vector_per_token_is_refused(lm: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'model\.rotary_emb'.*one vector per token"):
        tiny_collect(lm, tmp_path / "acts", "model.rotary_emb", context_tokens=8)


def test_the_filter_of_training_can_be_used_again(lm: tuple[Any, Any], tmp_path: Path) -> None:
    given = TokenFilter(median_norm=1e-3)
    manifest = tiny_collect(lm, tmp_path / "acts", token_filter=given)
    assert manifest["hookpoints"][OUT]["filtered"]["norm_outlier"] == 160 - sum(
        manifest["hookpoints"][OUT]["filtered"][reason] for reason in ("first_position", "special")
    )


def test_opening_needs_a_manifest_and_a_choice(lm: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no activation cache"):
        ActivationStore(tmp_path)
    tiny_collect(lm, tmp_path / "acts", [OUT, MLP])
    with pytest.raises(ValueError, match=r"several hookpoints.*model\.layers\.1, model\.layers\.0\.mlp:in"):
        ActivationStore(tmp_path / "acts")
    with pytest.raises(ValueError, match=r"no hookpoint 'model\.layers\.2'"):
        ActivationStore(tmp_path / "acts", "model.layers.2")
    assert ActivationStore(tmp_path / "acts", "model.layers.1:out").hookpoint == OUT


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no language model could be loaded from"):
        load_model(tmp_path)
