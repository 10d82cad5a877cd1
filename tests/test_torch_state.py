"""What a notebook may have changed about torch changes nothing here, and stays as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import permutations
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.evals import evaluate_rows
from apportion.language import load_model
from apportion.language.collect import collect
from apportion.rows.store import ActivationStore
from apportion.torch_state import in_eval_mode, usual


@contextmanager
def no_gradients() -> Iterator[None]:
    torch.set_grad_enabled(False)
    try:
        yield
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


@contextmanager
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
        assert torch.is_inference_mode_enabled()


def default_dtype(dtype: torch.dtype) -> Callable[[], Any]:
    @contextmanager
    def state() -> Iterator[None]:
        torch.set_default_dtype(dtype)
        try:
            yield
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)

    return state


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "gradients off": no_gradients,
    "inference mode": inference,
    "default float64": default_dtype(torch.float64),
    "default bfloat16": default_dtype(torch.bfloat16),
    "default device": default_device,
    "deterministic": deterministic,
}
with usual():
    X = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)) + 2


def train(name: str) -> dict[str, Tensor]:
    sae = ap.create(name, d_in=16, d_sae=48, k=4, seed=0)
    trainer = ap.Trainer(sae, ap.TrainConfig(total_tokens=2048, batch_tokens=256, lr=1e-2))
    trainer.fit(X, progress=False)
    metrics = ap.Trainer(sae, ap.TrainConfig(batch_tokens=256)).step(X[:256])
    sae.calibrate(X)
    sae.eval()
    latents = sae.encode(X[:50])
    x_hat = sae.decode(latents, X[:50])
    return {**sae.state_dict(), "values": latents.values.detach(), "x_hat": x_hat.detach(), "loss": metrics["loss"]}


@pytest.mark.few(14)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["topk", "mutual_choice", "feature_choice", "relu", "gated", "jumprelu", "switch"])
def test_training_is_the_same_in_every_state(name: str, state: str) -> None:
    wanted = train(name)
    with STATES[state]():
        found = train(name)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and found[key].device == tensor.device, key
        assert torch.allclose(found[key].double().nan_to_num(7), tensor.double().nan_to_num(7), atol=1e-5), key


@pytest.mark.parametrize("state", STATES)
def test_collecting_saving_and_measuring_in_every_state(state: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    text = ["the cat sat on the mat and looked at the dog"] * 100

    def work(folder: Path) -> tuple[dict[str, Any], Tensor]:
        model, tokenizer = load_model(tiny_model_dir)
        collect(model, tokenizer, "model.layers.1", text, tokens=640, out=folder / "acts", context_tokens=32)
        store = ActivationStore(folder / "acts")
        sae = ap.create("mutual_choice", d_in=32, d_sae=64, k=4, seed=0)
        sae.fit_input(store.gather(torch.arange(600, device="cpu")))
        sae.calibrate(store.gather(torch.arange(600, device="cpu")))
        sae.save(folder / "sae")
        measured = evaluate_rows({"sae": ap.load(folder / "sae")}, store, progress=False)["sae"].result()
        ids = torch.tensor([[1, 5, 9, 7, 3]], device="cpu")
        with usual(), torch.no_grad(), ap.splice(model, {"model.layers.1": ap.load(folder / "sae")}):
            return measured, model(input_ids=ids).logits.float()

    wanted, logits = work(tmp_path / "a")
    with STATES[state]():
        found, same = work(tmp_path / "b")
    assert {n: v for n, v in found.items() if isinstance(v, int | float)} == pytest.approx(
        {n: v for n, v in wanted.items() if isinstance(v, int | float)}, rel=1e-3
    )
    assert torch.allclose(logits, same, atol=1e-3)


def test_states_are_restored_after_an_error() -> None:
    with ExitStack() as stack:
        stack.enter_context(default_dtype(torch.float64)())
        stack.enter_context(no_gradients())
        with pytest.raises(ValueError):
            ap.create("topk", d_in=4, d_sae=8, k=99)
        with pytest.raises(ValueError):
            ap.Trainer(ap.create("topk", d_in=4, d_sae=8, k=2)).step(torch.zeros(3, 7))


def test_rows_that_were_made_in_inference_mode_are_trained_on() -> None:
    with torch.inference_mode():
        x = X.clone()
    for norm in ("dataset", "none"):
        sae = ap.create("topk", d_in=16, d_sae=48, k=4, seed=0, input_norm=norm)
        before = sae.W_dec.detach().clone()
        ap.Trainer(sae, ap.TrainConfig(batch_tokens=256)).step(x[:256])
        assert not torch.equal(sae.W_dec, before)


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("leaving", list(permutations(range(3))), ids=str)
def test_eval_mode_ends_when_the_last_one_leaves_in_whatever_order(leaving) -> None:
    """Two blocks of the model, one of a part of it, as several threads have them."""
    inner = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    model = torch.nn.Sequential(inner, torch.nn.Dropout())
    inner[0].eval()
    before = modes(model)
    blocks = [in_eval_mode(model), in_eval_mode(inner), in_eval_mode(model)]
    for block in blocks:
        block.__enter__()
    for i in leaving:
        assert not any(modes(inner))
        blocks[i].__exit__(None, None, None)
    assert modes(model) == before and before != [False] * 5


def test_eval_mode_in_many_threads_leaves_an_sae_as_it_was() -> None:
    sae = ap.create("topk", d_in=4, d_sae=8, k=2)
    seen = []

    def work() -> None:
        for _ in range(200):
            with sae.in_eval_mode():
                seen.append(any(modes(sae)))

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(modes(sae)) and not any(seen)
