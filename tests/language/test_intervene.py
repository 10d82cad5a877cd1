from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make
from torch import Tensor, nn

import apportion as ap
from apportion.about import About
from apportion.language.collect import collect
from apportion.language.hookpoints import capture
from apportion.language.intervene import _about, ablate, latent_column, splice, steer
from apportion.language.model import load_model, width_at
from apportion.latents import Latents
from apportion.rows import TokenFilter

IDS = torch.tensor([[1, 5, 9, 7, 3], [1, 4, 4, 8, 6]])
POINT = "model.layers.1"


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return load_model(tiny_model_dir)[0]


class ToySAE:
    """z = relu(s W x), x_hat = z W_dec / s: with W = [I; -I] the identity, otherwise lossy."""

    def __init__(self, W_enc: Tensor, W_dec: Tensor, scale: float = 1.0) -> None:
        self.W_enc, self.W_dec, self.scale = W_enc, W_dec, torch.tensor(scale)
        self.hookpoint: str | None = POINT
        self.rows_seen = 0

    def encode(self, x: Tensor) -> Latents:
        self.rows_seen += x.shape[:-1].numel()
        return Latents.from_dense(torch.relu(self.scale * x @ self.W_enc.T))

    def decode(self, latents: Latents, x: Tensor | None = None) -> Tensor:
        return latents.dense() @ self.W_dec / self.scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)


def identity_sae(scale: float = 1.0) -> ToySAE:
    W = torch.cat([torch.eye(32), -torch.eye(32)])
    return ToySAE(W, W, scale)


def half_sae() -> Any:
    W = torch.cat([torch.eye(32), -torch.eye(32)])
    return ToySAE(W, W / 2)


def lossy_sae(scale: float = 0.5) -> ToySAE:
    W = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) / 5
    return ToySAE(W, 3 * W, scale)


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def at_point(model: Any) -> Tensor:
    return capture(model, [POINT], IDS)[POINT]


@torch.no_grad()
def test_an_identity_sae_changes_nothing_and_a_lossy_one_does(model: Any) -> None:
    clean = model(IDS).logits
    with splice(model, {POINT: identity_sae(2.0)}):
        assert torch.allclose(model(IDS).logits, clean, atol=1e-5)
    with splice(model, {POINT: lossy_sae()}):
        assert not torch.allclose(model(IDS).logits, clean, atol=1e-2)
    assert torch.equal(model(IDS).logits, clean)


@torch.no_grad()
def test_splice_puts_the_reconstruction_at_every_hookpoint(model: Any) -> None:
    x = at_point(model)
    sae = lossy_sae()
    with splice(model, {POINT: sae, "model.layers.2.mlp:in": torch.zeros_like}):
        seen = capture(model, [POINT, "model.layers.2.mlp"], IDS)
    assert torch.equal(seen[POINT], sae(x))
    assert not seen["model.layers.2.mlp"].any()


@torch.no_grad()
def test_edits_and_errors(model: Any) -> None:
    x, sae = at_point(model), lossy_sae()
    shapes: list[tuple[int, ...]] = []

    def double(latents: Latents) -> Latents:
        shapes.append(latents.shape)
        return latents.map(lambda v: 2 * v)

    with splice(model, {POINT: sae}, edit=double):
        assert torch.allclose(at_point(model), 2 * sae(x), atol=1e-5)
    with splice(model, {POINT: sae}, edit=double, keep_error=True):
        assert torch.allclose(at_point(model), x + sae(x), atol=1e-5)
    with splice(model, {POINT: sae}, keep_error=True):
        assert torch.allclose(at_point(model), x, atol=1e-5)
    assert shapes == [(2, 5), (2, 5)]


@pytest.mark.parametrize("as_function", [True, False])
@torch.no_grad()
def test_filtered_rows_are_untouched_and_not_shown_to_the_sae(model: Any, as_function: bool) -> None:
    x, sae = at_point(model), lossy_sae()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 0] = mask[1, 3] = False
    with splice(model, {POINT: sae}, mask=(lambda t: mask) if as_function else mask):
        spliced = at_point(model)
    assert torch.equal(spliced[~mask], x[~mask])
    assert torch.allclose(spliced[mask], lossy_sae()(x)[mask], atol=1e-5)
    assert sae.rows_seen == 7
    with splice(model, {POINT: sae}, mask=torch.zeros(2, 5, dtype=torch.bool)):
        assert torch.equal(at_point(model), x)


def test_gradients_pass_through_a_splice(model: Any) -> None:
    sae = lossy_sae()
    sae.W_dec = sae.W_dec.clone().requires_grad_()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 0] = False
    with splice(model, {POINT: sae}, mask=mask):
        model(IDS).logits.logsumexp(-1).sum().backward()
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.abs().sum() > 0


def test_hooks_are_removed_after_an_exception(model: Any) -> None:
    before = num_hooks(model)
    with pytest.raises(RuntimeError, match="inside"), splice(model, {POINT: identity_sae()}):
        assert num_hooks(model) > before
        raise RuntimeError("inside")
    with pytest.raises(ZeroDivisionError), splice(model, {POINT: lambda x: 1 // 0}):
        model(IDS)
    assert num_hooks(model) == before


@torch.no_grad()
def test_mistakes_in_splice_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match="plain function is spliced in"), splice(model, {POINT: id}, edit=id):
        pass
    with pytest.raises(ValueError, match="has shape"), splice(model, {POINT: lambda x: x[..., :3]}):
        model(IDS)
    short = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="one bool per token"), splice(model, {POINT: identity_sae()}, mask=short):
        model(IDS)
    with pytest.raises(ValueError, match="nearest"), splice(model, {"model.layer.1": identity_sae()}):
        pass


@torch.no_grad()
def test_add_moves_along_the_unit_decoder_row(model: Any) -> None:
    x, sae = at_point(model), lossy_sae()
    with steer(model, sae, latent=7, add=4.0):
        moved = at_point(model) - x
    unit = sae.W_dec[7] / sae.W_dec[7].norm()
    assert torch.allclose(moved, (4 * unit).expand_as(moved), atol=1e-5)
    assert torch.allclose(moved.norm(dim=-1), torch.full((2, 5), 4.0), atol=1e-4)


@pytest.mark.parametrize("scale", [0.25, 1.0, 8.0])
@torch.no_grad()
def test_clamp_sets_the_code_and_nothing_else(model: Any, scale: float) -> None:
    x, sae = at_point(model), identity_sae(scale)
    with steer(model, sae, latent=3, clamp=2.0):
        clamped = at_point(model)
    expected = x.clone()
    expected[..., 3] = 2.0 / scale + x[..., 3].clamp_max(0)  # the negative part is latent 35's
    assert torch.allclose(clamped, expected, atol=1e-5)


@torch.no_grad()
def test_scale_and_ablate_change_the_contribution_only(model: Any) -> None:
    x, sae = at_point(model), lossy_sae()
    column = sae.encode(x).dense()[..., 5]
    assert 0 < int((column > 0).sum()) < 10
    contribution = column[..., None] * sae.W_dec[5] / sae.scale
    with steer(model, sae, latent=5, scale=3.0):
        assert torch.allclose(at_point(model), x + 2 * contribution, atol=1e-5)
    with ablate(model, sae, latent=5):
        ablated = at_point(model)
    assert torch.allclose(ablated, x - contribution, atol=1e-5)
    assert torch.equal(ablated[column == 0], x[column == 0])


@torch.no_grad()
def test_steering_respects_hookpoint_and_mask(model: Any) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2] = False
    x = capture(model, ["model.layers.0"], IDS)["model.layers.0"]
    with steer(model, lossy_sae(), latent=0, add=1.0, hookpoint="model.layers.0", mask=mask):
        moved = capture(model, ["model.layers.0"], IDS)["model.layers.0"]
    assert torch.equal((moved != x).any(-1), mask)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent": 40, "add": 1.0}, "latents 0 to 39"),
        ({"latent": 0}, "exactly one"),
        ({"latent": 0, "add": 1.0, "clamp": 1.0}, "exactly one"),
    ],
)
def test_mistakes_in_steer_are_named(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), steer(model, lossy_sae(), **settings):
        pass
    nowhere = lossy_sae()
    nowhere.hookpoint = None
    with pytest.raises(ValueError, match="hookpoint="), steer(model, nowhere, latent=0, add=1.0):
        pass


def test_one_column_equals_the_dense_one() -> None:
    z = torch.relu(torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1)))
    z[1] = 0
    for latent in range(6):
        assert torch.equal(latent_column(Latents.from_dense(z), latent), z[..., latent])


@torch.no_grad()
def test_splice_leaves_the_rows_alone_that_the_sae_was_not_trained_on(model: Any) -> None:
    """The filter travels with the SAE: position 0 and special tokens pass through untouched by default."""
    sae = half_sae()
    sae.source = About.from_json({"filter": {"special_tokens": True, "norm_outlier": 0, "special_ids": [2]}})
    ids = torch.tensor([[1, 5, 2, 7, 3]])
    place = "model.layers.1"
    clean = capture(model, [place], input_ids=ids)[place]
    with splice(model, {place: sae}):
        seen = capture(model, [place], input_ids=ids)[place]
    untouched = torch.tensor([[True, False, True, False, False]])
    assert torch.equal(seen[untouched], clean[untouched])
    assert torch.allclose(seen[~untouched], clean[~untouched] / 2)
    with splice(model, {place: sae}, mask=None):
        assert torch.allclose(capture(model, [place], input_ids=ids)[place], clean / 2)
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_position_0_is_counted_from_the_beginning_of_a_cached_text(model: Any) -> None:
    sae = half_sae()
    sae.source = About.from_json({"filter": {"special_tokens": False, "norm_outlier": 0}})
    place = "model.layers.1"
    cache = model(input_ids=torch.tensor([[1, 5, 4]]), use_cache=True).past_key_values
    clean = capture(model, [place], input_ids=torch.tensor([[7]]), past_key_values=copy.deepcopy(cache))[place]
    with splice(model, {place: sae}):
        seen = capture(model, [place], input_ids=torch.tensor([[7]]), past_key_values=copy.deepcopy(cache))[place]
    assert torch.allclose(seen, clean / 2), "the fourth token, not the first"


# SAEs of more than one place

MLP_IN, MLP = "model.layers.1.mlp:in", "model.layers.1.mlp"


def transcoder(**settings: Any) -> Any:
    sae = ap.create("skip_transcoder", d_in=32, d_sae=64, k=5, seed=0, hookpoint=MLP_IN, **settings)
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        sae.W_skip.copy_(torch.randn(32, 32, generator=g) / 6)
        sae.b_dec.copy_(torch.randn(32, generator=g))
    sae.fit_input(torch.randn(500, 32, generator=g) + 1, 3 * torch.randn(500, 32, generator=g))
    return sae.eval()


@torch.no_grad()
def test_a_transcoder_takes_the_place_of_its_module(model: Any) -> None:
    sae = transcoder(target_hookpoint=MLP)
    x = capture(model, [MLP_IN], IDS)[MLP_IN]
    with splice(model, {MLP: sae}):
        seen = capture(model, [MLP_IN, MLP], IDS)
    assert torch.equal(seen[MLP_IN], x), "its input is not touched"
    assert torch.equal(seen[MLP], sae(x))
    with splice(model, {MLP_IN: lambda t: 2 * t, f"{MLP}:out": sae}):
        assert torch.allclose(capture(model, [MLP], IDS)[MLP], sae(2 * x), atol=1e-5), "it reads what is there"
    assert num_hooks(model) == 0


@torch.no_grad()
def test_edits_and_masks_with_a_transcoder(model: Any) -> None:
    sae = transcoder(target_hookpoint=MLP)
    seen = capture(model, [MLP_IN, MLP], IDS)
    x, y = seen[MLP_IN], seen[MLP]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 0] = mask[1, 3] = False

    def double(latents: Latents) -> Latents:
        return latents.map(lambda v: 2 * v)

    latents = sae.encode(x)
    change = sae.decode(double(latents), x) - sae(x)
    with splice(model, {MLP: sae}, edit=double, keep_error=True, mask=mask):
        new = capture(model, [MLP], IDS)[MLP]
    assert torch.equal(new[~mask], y[~mask])
    assert torch.allclose(new[mask], (y + change)[mask], atol=1e-5)


@torch.no_grad()
def test_the_filters_of_both_places_of_a_transcoder_apply(model: Any) -> None:
    sae = transcoder(target_hookpoint=MLP)
    seen = capture(model, [MLP_IN, MLP], IDS)
    norms = {name: t.norm(dim=-1) for name, t in seen.items()}
    bounds = {name: n.flatten().sort().values[-3].item() for name, n in norms.items()}
    sae.info["source"] = {
        "sites": [
            {"hookpoint": name, "filter": TokenFilter(norm_outlier=2.0, median_norm=bound / 2).to_dict()}
            for name, bound in bounds.items()
        ]
    }
    with splice(model, {MLP: sae}):
        new = capture(model, [MLP], IDS)[MLP]
    kept = (norms[MLP_IN] <= bounds[MLP_IN]) & (norms[MLP] <= bounds[MLP])
    kept &= torch.arange(5) > 0
    assert 1 <= int(kept.sum()) < 8
    assert torch.equal((new != seen[MLP]).any(-1), kept)


@torch.no_grad()
def test_an_sae_for_all_layers_uses_the_filter_of_the_layer_it_is_put_at(model: Any) -> None:
    sae = ap.create("mlsae", d_in=32, d_sae=64, k=4, seed=0).eval()
    norms = at_point(model).norm(dim=-1)
    bound = norms.flatten().sort().values[-3].item()
    strict = TokenFilter(norm_outlier=2.0, median_norm=1e-3, first_position=False).to_dict()
    here = TokenFilter(norm_outlier=2.0, median_norm=bound / 2, first_position=False).to_dict()
    sae.info["source"] = {
        "sites": [{"hookpoint": "model.layers.0", "filter": strict}, {"hookpoint": POINT, "filter": here}]
    }
    clean = at_point(model)
    with splice(model, {POINT: sae}):
        assert torch.equal((at_point(model) != clean).any(-1), norms <= bound)


@pytest.mark.parametrize(
    ("place", "settings", "message"),
    [
        (MLP_IN, {"target_hookpoint": MLP}, "splice it in where it predicts"),
        ("model.layers.2.mlp", {"target_hookpoint": MLP}, "splice it in where it predicts"),
        (MLP_IN, {}, "splice it in where it predicts"),
        ("model.layers.0.mlp", {}, r"before 'model\.layers\.1\.mlp:in'"),
    ],
)
@torch.no_grad()
def test_places_where_a_transcoder_cannot_be_put(
    place: str, settings: dict[str, str], message: str, model: Any
) -> None:
    with pytest.raises(ValueError, match=message), splice(model, {place: transcoder(**settings)}):
        model(IDS)
    assert num_hooks(model) == 0


def test_what_cannot_be_spliced_or_steered(model: Any) -> None:
    nowhere = ap.create("transcoder", d_in=32, d_sae=64, k=5)
    with pytest.raises(ValueError, match="does not say what it reads"), splice(model, {MLP: nowhere}):
        pass
    with pytest.raises(ValueError, match="splice with edit="), steer(model, transcoder(), latent=3, add=1.0):
        pass
    crosscoder = ap.create("crosscoder", d_in=32, d_sae=64, k=5)
    with pytest.raises(ValueError, match="all of its sites"), splice(model, {POINT: crosscoder}):
        pass
    with pytest.raises(ValueError, match="W_dec has shape"), steer(model, crosscoder, latent=3, add=1.0):
        pass


# Padding, and places that nobody reads

LEFT = torch.tensor([[0, 0, 5, 9, 7], [1, 4, 4, 8, 6]])
ATTENDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
INTERVENTIONS: dict[str, Any] = {
    "splice": lambda model, sae: splice(model, {POINT: sae}),
    "splice all": lambda model, sae: splice(model, {POINT: sae}, mask=None),
    "splice some": lambda model, sae: splice(model, {POINT: sae}, mask=torch.ones(2, 5, dtype=torch.bool)),
    "splice a function": lambda model, sae: splice(model, {POINT: lambda x: x + 1}),
    "edit": lambda model, sae: splice(model, {POINT: sae}, edit=lambda z: z.map(lambda v: 2 * v), keep_error=True),
    "steer": lambda model, sae: steer(model, sae, latent=3, add=1.0),
    "clamp": lambda model, sae: steer(model, sae, latent=3, clamp=2.0),
    "steer some": lambda model, sae: steer(model, sae, latent=3, add=1.0, mask=lambda x: torch.ones(x.shape[:-1]) > 0),
    "ablate": lambda model, sae: ablate(model, sae, latent=3),
}


@pytest.mark.parametrize("kind", INTERVENTIONS)
@torch.no_grad()
def test_padding_is_never_touched_or_shown_and_may_hold_anything(model: Any, kind: str) -> None:
    sae = ap.create("topk", d_in=32, d_sae=64, k=64, seed=0, hookpoint=POINT, input_norm="none").eval()
    spoil = model.model.layers[1].register_forward_hook(
        lambda m, args, x: x.masked_fill(~ATTENDED[..., None], torch.nan), prepend=True
    )
    try:
        with INTERVENTIONS[kind](model, sae):
            seen = capture(model, [POINT], input_ids=LEFT, attention_mask=ATTENDED.long())[POINT]
    finally:
        spoil.remove()
    clean = capture(model, [POINT], input_ids=LEFT, attention_mask=ATTENDED.long())[POINT]
    assert seen[~ATTENDED].isnan().all(), "padding passes through as it is"
    assert seen[ATTENDED].isfinite().all()
    changed = (seen != clean).any(-1) & ATTENDED
    assert changed.any() if kind in ("clamp", "ablate") else torch.equal(changed, ATTENDED)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_position_0_is_the_first_attended_token(model: Any, side: str) -> None:
    sae = half_sae()
    sae.source = About.from_json({"filter": TokenFilter(norm_outlier=0.0).to_dict()})
    mask = ATTENDED if side == "left" else ATTENDED.flip(1)
    ids = LEFT if side == "left" else torch.where(mask, LEFT.flip(1), 0)
    clean = capture(model, [POINT], input_ids=ids, attention_mask=mask.long())[POINT]
    with splice(model, {POINT: sae}):
        seen = capture(model, [POINT], input_ids=ids, attention_mask=mask.long())[POINT]
    expected = mask.clone()
    expected[0, 2 if side == "left" else 0] = expected[1, 0] = False
    assert torch.equal((seen != clean).any(-1) & mask, expected)


def test_a_place_that_nothing_reads_is_refused() -> None:
    model = make("olmoe")
    gate = "model.layers.1.mlp.gate"
    returned: list[Any] = []
    handle = model.get_submodule(gate).register_forward_hook(lambda m, args, result: returned.append(result))
    model(input_ids=IDS)
    handle.remove()
    sae = ap.create("topk", d_in=4, d_sae=8, k=2, seed=0, hookpoint=gate).eval()
    for intervene in (
        lambda: splice(model, {gate: torch.zeros_like}),
        lambda: steer(model, sae, latent=0, add=5.0),
        lambda: ablate(model, sae, latent=0),
    ):
        if isinstance(returned[0], tuple):  # logits first, and the model goes by the weights behind them
            with pytest.raises(ValueError, match="nothing in the model reads what stands at"), intervene():
                pass
            with splice(model, {f"{gate}:out[1]": torch.zeros_like}):
                assert not capture(model, ["model.layers.1.mlp"], input_ids=IDS)["model.layers.1.mlp"].any()
        else:
            with intervene():
                pass
    assert num_hooks(model) == 0
    with splice(model, {"model.layers.1.mlp": torch.zeros_like}):
        pass


def test_nothing_is_said_of_places_that_a_few_tokens_do_not_reach() -> None:
    class TwoTowers(nn.Module):
        """Reads images, if it is given some, besides tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.text, self.image = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
            x = self.text(self.embed(input_ids))
            return x if pixel_values is None else x + self.image(pixel_values)

    model = TwoTowers()
    with splice(model, {"image": lambda x: 0 * x, "embed:in": lambda ids: ids * 0}):
        seen = model(torch.tensor([[1, 2]]), torch.ones(1, 1, 3))
    assert torch.allclose(seen, model(torch.tensor([[0, 0]])), atol=1e-6)


def test_a_list_of_layers_and_a_layer_that_text_never_reaches(model: Any) -> None:
    refusal = pytest.raises(ValueError, match=r"holds modules .* choose one of them, such as 'model.layers.0'")
    with refusal, splice(model, {"model.layers": torch.zeros_like}):
        pass
    for takes, refused in (("pixel_values", False), ("nothing", True)):
        both = _TextAndImages(takes)
        if refused:
            with (
                pytest.raises(ValueError, match="nothing in the model reads"),
                splice(both, {"eyes": torch.zeros_like}),
            ):
                pass
            continue
        with splice(both, {"eyes": torch.zeros_like}):
            seen = both(IDS, pixel_values=torch.ones(2, 7, 4))
        assert torch.equal(seen, both(IDS)) and not torch.equal(seen, both(IDS, pixel_values=torch.ones(2, 7, 4)))


class _TextAndImages(nn.Module):
    def __init__(self, takes: str) -> None:
        super().__init__()
        self.words, self.eyes = nn.Embedding(16, 4), nn.Linear(4, 4, bias=False)
        if takes != "pixel_values":
            self.forward = self.text

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        seen = 0 if pixel_values is None else self.eyes(pixel_values).mean(1, keepdim=True)
        return self.words(input_ids) + seen

    def text(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids)


@torch.no_grad()
def test_padding_of_the_text_says_nothing_of_images() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = LlamaConfig(vocab_size=64, pad_token_id=0, **sizes)
    images = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=images, text_config=text, image_token_index=63, vision_feature_layer=-1)
    ).eval()
    ids = torch.tensor([[2, 63, 63, 63, 63, 5, 7]])
    padded, image = torch.cat([ids, torch.zeros(1, 5, dtype=ids.dtype)], 1), torch.randn(1, 3, 8, 8)
    eyes, words = (
        next(n for n, _ in llava.named_modules() if n.endswith(f"{p}.layers.0")) for p in ("encoder", "language_model")
    )
    clean = llava(input_ids=ids, pixel_values=image).logits[0, 6]
    for place, seen in ((eyes, 5), (words, 7)):
        rows: list[int] = []

        def push(x: Tensor, rows: list[int] = rows) -> Tensor:
            rows.append(x.shape[:-1].numel())
            return x + 5 * torch.linspace(-1, 1, 32)

        pushed = []
        for given in (ids, padded):
            with splice(llava, {place: push}):
                mask = (given != 0).long()
                pushed.append(llava(input_ids=given, attention_mask=mask, pixel_values=image).logits[0, 6])
        assert rows[-2:] == [seen, seen], "all patches; all tokens but padding"
        assert torch.allclose(pushed[0], pushed[1], atol=1e-5) and not torch.allclose(pushed[0], clean, atol=1e-3)


@torch.no_grad()
def test_a_transcoder_whose_module_takes_contexts_and_returns_rows() -> None:
    """As some mixtures of experts do."""

    class Flat(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flatten(0, 1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mlp, self.head = nn.Embedding(16, 4), Flat(4, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.words(input_ids)
            return self.head(self.mlp(x).reshape(x.shape))

    torch.manual_seed(0)
    host = Model()
    sae = ap.create("transcoder", d_in=4, d_out=4, d_sae=8, k=2, seed=0, input_norm="none", hookpoint="mlp:in").eval()
    kept = torch.arange(10).reshape(2, 5) % 3 != 0
    wanted = torch.where(kept[..., None], sae(host.words(IDS)), host.mlp(host.words(IDS)).reshape(2, 5, 4))
    with splice(host, {"mlp": sae}, mask=lambda x: kept.reshape(x.shape[:-1])):
        assert torch.allclose(host(IDS), host.head(wanted), atol=1e-6)


def test_the_trial_leaves_no_trace(model: Any) -> None:
    other = make("gpt2").train()
    state = torch.get_rng_state()
    with splice(other, {"transformer.h.1": torch.zeros_like}):
        pass
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in other.modules())
    passes: list[int] = []
    handle = other.register_forward_hook(lambda *_: passes.append(1))
    with splice(other, {"transformer.h.1": torch.zeros_like}):
        pass
    handle.remove()
    assert not passes, "a place is tried once"


@torch.no_grad()
def test_a_shared_layer_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    albert = AutoModel.from_config(AutoConfig.for_model("albert", vocab_size=64, intermediate_size=48, **sizes)).eval()
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    with pytest.raises(ValueError, match="several times in one forward pass"), splice(albert, {layer: lambda x: 0 * x}):
        albert(input_ids=IDS)
    with pytest.raises(ValueError, match="several times in one forward pass"):
        width_at(albert, layer)
    with pytest.raises(ValueError, match="several times in one forward pass"):
        collect(albert, None, layer, IDS.repeat(8, 1), tokens=20, context_tokens=5, out=tmp_path / "acts")
    assert num_hooks(albert) == 0 and not (tmp_path / "acts").exists()


@torch.no_grad()
def test_encoders_and_decoders_have_their_own_tokens_and_padding() -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes, **tokens)).eval()
    sae = half_sae()
    sae.source = About.from_json({"filter": TokenFilter(norm_outlier=0.0, special_ids=(7,)).to_dict()})
    inputs = {"input_ids": LEFT, "attention_mask": ATTENDED.long(), "decoder_input_ids": torch.tensor([[0, 7, 3]] * 2)}
    encoder, decoder = "encoder.block.0", "decoder.block.0"
    clean = capture(t5, [encoder, decoder], **inputs)
    with splice(t5, {encoder: sae}):
        seen = capture(t5, [encoder], **inputs)[encoder]
    expected = ATTENDED & (LEFT != 7)
    expected[0, 2] = expected[1, 0] = False
    assert torch.equal((seen != clean[encoder]).any(-1), expected)
    with splice(t5, {decoder: sae}):
        seen = capture(t5, [decoder], **inputs)[decoder]
    assert (seen != clean[decoder]).any(-1).tolist() == [[False, False, True]] * 2
    rows: list[int] = []
    sae.source = About(filter=TokenFilter(norm_outlier=0.0).to_dict())
    sae.encode = lambda x, encode=sae.encode: rows.append(len(x)) or encode(x)
    with splice(t5, {decoder: sae}):
        t5.generate(LEFT, attention_mask=ATTENDED.long(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert rows == [2, 2, 2], "the start token is the first; then one token at a time"


def test_a_layer_that_is_run_again_for_its_gradients_has_the_same_tokens() -> None:
    """Gradient checkpointing: the second run comes after the pass, and its mask is that of the pass."""
    found = []
    for again in (False, True):
        model = make("llama").train()
        model.requires_grad_(True)
        if again:
            model.gradient_checkpointing_enable()
        sae = half_sae()
        sae.source = About.from_json({"filter": TokenFilter(norm_outlier=0.0).to_dict()})
        with splice(model, {"model.layers.1.mlp": sae}):
            model(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
        found.append(model.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.allclose(found[0], found[1], atol=1e-5) and found[0].abs().sum() > 0


def test_what_else_a_foreign_codec_says_of_its_source_is_its_own_affair():
    class Foreign:
        info = {"source": {"model": "gpt2", "text": 3, "filter": TokenFilter(norm_outlier=0.0).to_dict()}}  # noqa: RUF012

    said = _about(Foreign())
    assert said.filter == Foreign.info["source"]["filter"] and said.language is None
