"""Loading models of every class, and running contexts through them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make

from apportion.language import load_model
from apportion.language.hookpoints import middle_layer
from apportion.language.model import check_context_tokens, predicts_next, run_contexts, width_at
from apportion.language.passes import inputs_for
from apportion.torch_state import in_eval_mode

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
BERT = TOKENS | {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
T5 = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
IDS = torch.arange(3, 11)[None]


def saved(folder: Path, kind: str, model_type: str, **settings: Any) -> Path:
    """A random model, saved by this auto class, without a tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    getattr(transformers, kind).from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "model_type", "settings", "expected"),
    [
        ("AutoModel", "bert", BERT, "BertModel"),
        ("AutoModelForMaskedLM", "bert", BERT, "BertForMaskedLM"),
        ("AutoModelForSequenceClassification", "bert", BERT, "BertModel"),
        ("AutoModelForSeq2SeqLM", "t5", T5, "T5ForConditionalGeneration"),
        ("AutoModelForCausalLM", "gpt2", TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4}, "GPT2LMHeadModel"),
        ("AutoModel", "gpt2", TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4}, "GPT2Model"),
    ],
)
def test_a_checkpoint_is_loaded_as_what_it_is(
    tmp_path: Path, kind: str, model_type: str, settings: dict[str, Any], expected: str
) -> None:
    model, tokenizer = load_model(saved(tmp_path / "m", kind, model_type, **settings))
    assert type(model).__name__ == expected and tokenizer is None
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert predicts_next(model) == (expected == "GPT2LMHeadModel")
    x = run_contexts(model, [place := middle_layer(model)], IDS)[place]
    assert x.shape == (8, 32)


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path / "m", "AutoModel", "bert", **BERT)
    with pytest.raises(ValueError, match=r"no weights for .*which would be random.*--auto-class AutoModel"):
        load_model(folder, auto_class="AutoModelForMaskedLM")
    with pytest.raises(ValueError, match="no auto class"):
        load_model(folder, auto_class="BertModel")
    masked = saved(tmp_path / "masked", "AutoModelForMaskedLM", "bert", **BERT)
    with caplog.at_level(logging.WARNING, logger="apportion"):
        assert type(load_model(masked, auto_class="AutoModel")[0]).__name__ == "BertModel"
    assert "pooler" in caplog.text and "do not use hookpoints there" in caplog.text


def test_options_of_loading(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(tiny_model_dir, "bfloat16", device="cpu", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert tokenizer.name_or_path == str(tiny_model_dir) == model.config.name_or_path
    monkeypatch.setenv("HOME", str(tiny_model_dir.parent))
    assert load_model(f"~/{tiny_model_dir.name}")[0].config.hidden_size == 32
    with pytest.raises(ValueError, match="no language model could be loaded from 'nowhere/at-all'"):
        load_model("nowhere/at-all")


def test_the_decoder_of_an_encoder_decoder_is_refused_in_words(tmp_path: Path) -> None:
    model, _ = load_model(saved(tmp_path / "m", "AutoModelForSeq2SeqLM", "t5", **T5))
    assert run_contexts(model, ["encoder.block.1"], IDS)["encoder.block.1"].shape == (8, 32)
    with pytest.raises(ValueError, match="its decoder runs on pairs of texts: choose a hookpoint in 'encoder'"):
        run_contexts(model, ["decoder.block.1"], IDS)


def test_models_run_as_in_evaluation_and_stay_in_training() -> None:
    model = make("gpt2")
    model.train()
    model.transformer.h[0].mlp.eval()
    before = [m.training for m in model.modules()]
    one, two = (run_contexts(model, ["transformer.h.1"], IDS)["transformer.h.1"] for _ in range(2))
    assert torch.equal(one, two)
    assert [m.training for m in model.modules()] == before
    with pytest.raises(ZeroDivisionError), in_eval_mode(model):
        assert not any(m.training for m in model.modules())
        _ = 1 // 0
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("longest", [None, -1, 0, 128])
def test_positions_without_a_limit(longest: int | None) -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=longest))
    check_context_tokens(model, 128)
    if longest == 128:
        with pytest.raises(ValueError, match="more than the 128 positions"):
            check_context_tokens(model, 129)


def test_the_middle_of_a_multimodal_model_is_in_its_text_tower() -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0}  # fmt: skip
    seeing = {"hidden_size": 16, "num_hidden_layers": 7, "num_attention_heads": 2, "intermediate_size": 24,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    text |= {"model_type": "llama", "max_position_embeddings": 16}
    config = AutoConfig.for_model("llava", text_config=text, vision_config={"model_type": "clip_vision_model"} | seeing)
    model = AutoModelForImageTextToText.from_config(config).eval()
    place = middle_layer(model)
    assert place.endswith("layers.1") and "language_model" in place and width_at(model, place) == 32
    with pytest.raises(ValueError, match="more than the 16 positions"):
        check_context_tokens(model, 17)


def test_saved_again_and_loaded_it_is_the_same_model(tmp_path: Path) -> None:
    from apportion.language.fingerprint import model_fingerprint
    from apportion.same_model import model_difference

    for name in ("olmoe", "falcon", "mamba"):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        again = load_model(tmp_path / name, "bfloat16")[0]
        assert model_difference(model_fingerprint(model), model_fingerprint(again)) is None, name


LLAMA_LIKE = TOKENS | {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
SEEING = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24,
          "image_size": 16, "patch_size": 8}  # fmt: skip
QWENS_EYES = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}
ROPE = {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "mrope"}}
MARKS = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61}
BART = TOKENS | {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
                 "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
                 "max_position_embeddings": 64, "decoder_start_token_id": 0}  # fmt: skip
READERS = {
    "bert": ("AutoModelForMaskedLM", BERT, "bert.encoder.layer.1"),
    "roberta": ("AutoModel", BERT, "encoder.layer.1"),
    "distilbert": (
        "AutoModelForMaskedLM",
        {"vocab_size": 64, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
        "distilbert.transformer.layer.1",
    ),
    "modernbert": ("AutoModelForMaskedLM", BERT | {"cls_token_id": 2, "sep_token_id": 1}, "model.layers.1"),
    "t5": ("AutoModelForSeq2SeqLM", T5 | {"num_layers": 3}, "encoder.block.1"),
    "bart": ("AutoModelForSeq2SeqLM", BART, "model.encoder.layers.1"),
    "gemma3": (
        "AutoModelForImageTextToText",
        {"text_config": LLAMA_LIKE | {"sliding_window": 8}, "image_token_index": 63, "mm_tokens_per_image": 4,
         "vision_config": SEEING | {"model_type": "siglip_vision_model"}},
        "model.language_model.layers.1",
    ),
    "qwen2_5_vl": (
        "AutoModelForImageTextToText",
        {"text_config": LLAMA_LIKE | ROPE, "vision_config": QWENS_EYES} | MARKS,
        "model.language_model.layers.1",
    ),
    "smolvlm": (
        "AutoModelForImageTextToText",
        {"text_config": LLAMA_LIKE | {"model_type": "llama"}, "vision_config": SEEING, "image_token_id": 63},
        "model.text_model.layers.1",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # transformers 4 uses it for ModernBERT
@pytest.mark.parametrize("family", READERS)
@torch.no_grad()
def test_encoders_and_towers_that_read_text(family: str) -> None:
    """Rows are the model's own hidden states, of the encoder where there is a decoder too."""
    import transformers

    kind, settings, layer = READERS[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(family, **settings)).eval()
    assert middle_layer(model) == layer
    x = run_contexts(model, [layer], IDS, whole=True)[layer]
    result = model(**inputs_for(model, IDS), output_hidden_states=True)
    states = getattr(result, "encoder_hidden_states", None) or result.hidden_states
    assert torch.allclose(x, states[2][0], atol=1e-6)


def test_a_model_that_wants_images_is_said_to() -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    text = BERT | {"max_position_embeddings": 64}
    config = CLIPConfig(text_config=text, vision_config=SEEING)
    with pytest.raises(ValueError, match=r"CLIPModel does not run on tokens alone .*: load the part of it"):
        width_at(CLIPModel(config).eval(), "text_model.encoder.layers.1")
    tower = CLIPTextModel(config.text_config).eval()
    assert width_at(tower, middle_layer(tower)) == 32
    with pytest.raises(ValueError, match="has no module"):
        width_at(CLIPModel(config).eval(), "text_model.layers.1")
