"""Names of places that other libraries use against what transformers models really compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.evals.language_model import evaluate_model, recalibrate_in_model
from apportion.language.collect import collect
from apportion.language.hook_names import (
    EMBEDDINGS,
    LAYERS,
    OLMOS_2,
    ONLY_READ,
    POINTS,
    SCALED,
    STREAM,
    TOWERS,
    WITHIN,
    from_hookpoint,
    module_of,
    to_hookpoint,
)
from apportion.language.hookpoints import capture, expand, place_in
from apportion.language.intervene import splice, steer
from apportion.language.live import LiveSource
from apportion.language.model import width_at
from apportion.rows.filter import TokenFilter

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GPT = {"n_layer": 2, "n_head": 2, "n_embd": 16}
LLAMA_LIKE = WIDTH | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
           "shared_expert_intermediate_size": 24}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_neox": WIDTH,
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": GPT | {"rotary_dim": 4},
    "phi": WIDTH,
    "phi3": WIDTH | {"num_key_value_heads": 2, "pad_token_id": 0},
    "opt": WIDTH | {"ffn_dim": 24, "word_embed_proj_dim": 16, "activation_function": "gelu"},
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), WIDTH | {"is_decoder": True, "pad_token_id": 0}),
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe"), LLAMA_LIKE | EXPERTS),
    "olmo": WIDTH | {"num_key_value_heads": 2},
    "smollm3": LLAMA_LIKE | {"pad_token_id": 0},
}
IDS = torch.tensor([[3, 1, 4, 1, 5]])
FAMILIES = [family for family in LAYERS if family not in TOWERS]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return tiny(family)


def tiny(family: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(family, vocab_size=32, **TINY.get(family, LLAMA_LIKE), **settings)
    except ValueError:
        pytest.skip(f"this version of transformers has no {family}")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # norms with weights, biases that are not zero
    return model


@torch.no_grad()
def seen_at(model: Any, *names: str) -> dict[str, Tensor]:
    """Activations by the names that were asked for, in the form [1, positions, d]."""
    points = {name: str(place_in(model, name)) for name in names}
    found = capture(model, list(points.values()), IDS)
    return {name: found[point].reshape(1, IDS.shape[1], -1) for name, point in points.items()}


def test_every_name_goes_there_and_back(family: str) -> None:
    for name in STREAM | WITHIN[family]:
        back = from_hookpoint(place := to_hookpoint(f"blocks.7.{name}", family), family)
        assert to_hookpoint(back, family) == place
        assert back == f"blocks.7.{name}" or family in OLMOS_2, "whose MLP is given the stream itself"


def test_every_name_is_an_activation_of_the_model(family: str, model: Any) -> None:
    names = [f"blocks.1.{name}" for name in STREAM | WITHIN[family] | ONLY_READ[family]]
    assert {name: str(place_in(model, name)) for name in names} == {name: to_hookpoint(name, family) for name in names}
    seen_at(model, *names)


def test_the_parts_of_a_block_add_up(family: str, model: Any) -> None:
    """resid_post = resid_pre + attn_out + mlp_out, and resid_mid lies between the two."""
    names = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post", "hook_resid_mid"]
    known = [name for name in names if name in STREAM | WITHIN[family]]
    seen = seen_at(model, *(f"blocks.0.{name}" for name in known))
    x = {name: seen[f"blocks.0.{name}"] for name in known}
    mid = x["hook_resid_pre"] + x["hook_attn_out"]
    if "hook_resid_mid" in x:
        assert torch.allclose(mid, x["hook_resid_mid"], atol=1e-5)
    if "hook_normalized_resid_post" in WITHIN[family]:  # BERT norms what it goes on with
        mid = model.get_submodule(to_hookpoint("blocks.0.hook_resid_mid", family).removesuffix(":in"))(mid)
    assert torch.allclose(mid + x["hook_mlp_out"], x["hook_resid_post"], atol=1e-5)


def test_heads_and_neurons_are_what_the_output_projections_are_given(family: str, model: Any) -> None:
    """So their projection is what the attention and the MLP return, before a norm if there is one."""
    for name, behind in {"attn.hook_z": "attn.hook_out", "mlp.hook_post": "mlp.hook_out"}.items():
        if name not in WITHIN[family]:
            assert family in ("olmoe", "qwen2_moe", "qwen3_moe"), "every expert has neurons of its own"
            continue
        path = to_hookpoint(f"blocks.1.{name}", family).removesuffix(":in").replace("mlp.act", "mlp.c_proj")
        path = path.replace("mlp.c_proj", "mlp.dense_4h_to_h") if family == "gpt_neox" else path
        seen = seen_at(model, f"blocks.1.{name}", f"blocks.1.{behind}")
        with torch.no_grad():
            made = model.get_submodule(path)(seen[f"blocks.1.{name}"])
        assert torch.allclose(made, seen[f"blocks.1.{behind}"], atol=1e-5), name


def test_what_modules_return_is_not_what_is_added_where_a_norm_lies_between(family: str, model: Any) -> None:
    normed = family in (*SCALED[1:], *OLMOS_2)
    for raw, added in (("attn_out", "attn_out_post"), ("mlp_out", "mlp_out_post")):
        x, y = seen_at(model, f"{raw}.1", f"{added}.1").values()
        assert torch.equal(x, y) != normed


def test_the_activation_is_that_of_what_lies_before_it(family: str, model: Any) -> None:
    if "mlp.hook_pre" not in WITHIN[family]:
        return
    names = [f"blocks.1.{name}" for name in ("mlp.hook_pre", "mlp.hook_post", "mlp.hook_pre_linear")]
    pre, post, *linear = seen_at(model, *names[: 2 + ("mlp.hook_pre_linear" in WITHIN[family])]).values()
    activation = next(m for n, m in model.named_modules() if n.endswith(("act", "act_fn", "activation_fn")))
    assert torch.allclose(activation(pre) * (linear[0] if linear else 1), post, atol=1e-5)


def test_names_of_interp_engine_are_those_of_transformerlens(family: str, model: Any) -> None:
    for name, lens in POINTS.items():
        if lens in STREAM | WITHIN[family] | ONLY_READ[family]:
            assert place_in(model, f"{name}.1") == place_in(model, f"blocks.1.{lens}")
    assert expand(model, "resid_post.*") == [to_hookpoint(f"blocks.{i}.hook_resid_post", family) for i in range(2)]
    assert expand(model, ["z.1", "blocks.1.attn.hook_z"]) == [to_hookpoint("blocks.1.attn.hook_z", family)]


def test_embedded_tokens(family: str, model: Any) -> None:
    for name in EMBEDDINGS:
        if name == "hook_embed" and family in SCALED:
            with pytest.raises(ValueError, match=r"scale what 'hook_embed' names: use 'blocks\.0\.hook_resid_pre'"):
                place_in(model, name)
        else:
            assert torch.equal(seen_at(model, name)[name], model.get_input_embeddings()(IDS))


def test_the_module_whose_output_is_a_place(family: str, model: Any) -> None:
    found = 0
    for name in STREAM | WITHIN[family]:
        hookpoint = to_hookpoint(f"blocks.1.{name}", family)
        if (module := module_of(hookpoint, family)) is not None:
            seen = seen_at(model, hookpoint, module)
            assert torch.equal(seen[hookpoint], seen[module]), name
            found += 1
    assert found >= 3
    assert module_of(f"{LAYERS[family]}.0:in", family) is None, "embeddings are scaled, or summed, by no module"


def test_places_that_no_module_puts_out() -> None:
    assert module_of("transformer.h.1.attn.c_proj:in", "gpt2") is None
    assert module_of("encoder.4:in", None) is None and module_of("encoder.4", None) == "encoder.4"
    assert module_of("model.layers.2.mlp:in", "gpt2") is None, "of another family"
    assert module_of("model.layers.2.mlp:out[1]", "llama") is None, "beside the first"
    with pytest.raises(ValueError, match="no name for"):
        from_hookpoint("model.layers.2.mlp:out[1]", "llama")


def test_what_goes_into_an_mlp_has_one_name(family: str, model: Any) -> None:
    """Of circuit-tracer, SAELens and TransformerBridge; HookedTransformer has another for what comes out."""
    into, out = (to_hookpoint(f"blocks.1.mlp.{name}", family) for name in ("hook_in", "hook_out"))
    assert from_hookpoint(into, family) == "blocks.1.mlp.hook_in" or family in OLMOS_2
    if into == f"{out}:in":
        seen = seen_at(model, into, out)
        with torch.no_grad():
            made = model.get_submodule(out)(seen[into])
        assert torch.allclose(made[0] if isinstance(made, tuple) else made, seen[out], atol=1e-6)


def test_the_stream_before_an_mlp(family: str) -> None:
    wanted = "hook_resid_mid" if "hook_resid_mid" in WITHIN[family] else "hook_resid_pre"
    assert to_hookpoint("blocks.1.hook_mlp_in", family) == to_hookpoint(f"blocks.1.{wanted}", family)


@pytest.mark.parametrize("name", ["blocks.0.ln1.hook_normalized", "hook_embed", "blocks.x.y.hook_resid_pre"])
def test_names_without_a_module_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="known are blocks"):
        to_hookpoint(name, "gpt2")


def test_unknown_families_and_places_are_refused() -> None:
    with pytest.raises(ValueError, match="Names of 'mamba' models are not known"):
        to_hookpoint("blocks.0.hook_resid_pre", "mamba")
    with pytest.raises(ValueError, match="no name for 'model"):
        from_hookpoint("model.layers.1.self_attn.q_proj", "llama")


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "phi"])
def test_parallel_blocks_have_no_stream_between_attention_and_mlp(family: str) -> None:
    for name in ("blocks.1.hook_resid_mid", "resid_mid.1"):
        with pytest.raises(ValueError, match=r"same stream: use blocks\.1\.hook_resid_pre .* or hook_resid_post"):
            place_in(tiny(family), name)


def test_a_family_that_is_not_known_has_the_names_of_its_stream() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", vocab_size=32, hidden_size=16, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    assert expand(model, "resid_post.1") == ["transformer.h.1"]
    assert expand(model, "blocks.*.hook_resid_pre") == ["transformer.h.0:in", "transformer.h.1:in"]
    with pytest.raises(ValueError, match=r"within blocks names are known for gpt2, .* Give the path of a module"):
        expand(model, "blocks.1.attn.hook_z")


def test_opt_with_norms_behind_its_sums_has_no_names_within() -> None:
    with pytest.raises(ValueError, match="norms behind the sums"):
        place_in(tiny("opt", do_layer_norm_before=False), "blocks.1.hook_resid_mid")


def test_bare_models_and_towers() -> None:
    """Where the layers lie is seen, not taken from the family."""
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    assert str(place_in(GPT2Model(GPT2Config(vocab_size=32, **GPT)), "z.1")) == "h.1.attn.c_proj:in"
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4} | WIDTH
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=32, **LLAMA_LIKE), vision_config=vision, image_token_id=31)
    layers = "model.language_model.layers"
    assert expand(LlavaForConditionalGeneration(config), "z.1") == [f"{layers}.1.self_attn.o_proj:in"]


def test_a_module_of_that_name_goes_first() -> None:
    block = nn.ModuleDict({"hook_resid_post": nn.Identity()})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "z": nn.ModuleList([nn.Identity()])})
    assert expand(model, ["blocks.0.hook_resid_post", "z.0"]) == ["blocks.0.hook_resid_post", "z.0"]
    with pytest.raises(ValueError, match="does not say what embeds its tokens"):
        place_in(model, "embeddings")


@pytest.mark.parametrize("name", ["blocks.7.hook_resid_post", "blocks.0.hook_resid_post:in", "mlp_post.1"])
def test_layers_that_are_not_there_and_names_of_nobody(name: str) -> None:
    with pytest.raises(ValueError, match=r"the model has no module"):
        expand(tiny("llama"), name)


def test_what_is_stored_is_the_path(tmp_path: Path) -> None:
    model, path = tiny("llama"), "model.layers.1.self_attn.o_proj:in"
    ids = torch.arange(3, 27).view(4, 6)
    manifest = collect(model, None, "blocks.1.attn.hook_z", ids, tokens=24, context_tokens=6, out=tmp_path / "acts")
    assert list(manifest["hookpoints"]) == [path]
    source = LiveSource(model, None, "z.1", ids, held_out_share=0.5)
    assert source.hookpoint == source.describe().hookpoint == path
    assert width_at(model, "mlp_act.0") == 24


@torch.no_grad()
def test_interventions_take_these_names() -> None:
    model, path = tiny("llama"), "model.layers.1"
    sae = ap.create("topk", d_in=16, d_sae=32, k=4, seed=0).eval()
    for name in ("blocks.1.hook_resid_post", "resid_post.1"):
        with splice(model, {path: sae}):
            expected = model(IDS).logits
        with splice(model, {name: sae}):
            assert torch.equal(model(IDS).logits, expected)
        with steer(model, sae, latent=3, add=2.0, hookpoint=path):
            expected = model(IDS).logits
        with steer(model, sae, latent=3, add=2.0, hookpoint=name):
            assert torch.equal(model(IDS).logits, expected)


def test_evaluations_take_these_names() -> None:
    model, ids, rows = tiny("llama"), torch.arange(24).view(4, 6), TokenFilter(norm_outlier=0.0)
    sae = ap.create("topk", d_in=16, d_sae=32, k=4, seed=0).eval()
    sae.calibrate(torch.randn(64, 16))
    found = [
        evaluate_model({"it": sae}, model, ids, rows, hookpoint=place, progress=False)[1].of("it")
        for place in ("resid_post.0", "model.layers.0")
    ]
    assert found[0] == found[1] and found[0]["delta_ce"] != 0
    places = ("blocks.0.hook_resid_post", "model.layers.0")
    first, second = (recalibrate_in_model(sae, model, ids, rows, hookpoint=place) for place in places)
    assert first == second


@torch.no_grad()
def test_a_sum_that_is_kept_past_a_norm_can_be_read_and_not_changed() -> None:
    """In BERT the norm is all that reads it."""
    llama, place = tiny("llama"), "model.layers.1.post_attention_layernorm:in"
    sae = ap.create("topk", d_in=16, d_sae=32, k=4, seed=0).eval()
    for name in ("blocks.1.hook_resid_mid", "resid_mid.1"):
        with pytest.raises(ValueError, match=f"can be read at '{place}' but not changed"), splice(llama, {name: sae}):
            pass
        with pytest.raises(ValueError, match="not changed"), steer(llama, sae, latent=0, add=1.0, hookpoint=name):
            pass
        with splice(tiny("bert"), {name: sae}):
            pass
    with splice(llama, {place: sae}):
        pass
