"""Which precision candidates are looked for in: the fastest that was measured, if it gains something."""

from __future__ import annotations

import pytest
import torch

from apportion.kernels import fastest as module
from apportion.kernels.fastest import fastest, screens

X, W = torch.randn(64, 32), torch.randn(128, 32)


@pytest.mark.parametrize(
    ("taken", "wanted"),
    [
        ({None: 1.0, "bfloat16": 0.5, "int8": 0.4}, "int8"),
        ({None: 1.0, "bfloat16": 0.5, "int8": 0.6}, "bfloat16"),
        ({None: 1.0, "bfloat16": 2.0, "int8": 3.0}, None),
        ({None: 1.0, "bfloat16": 0.97, "int8": 3.0}, None),
        ({None: 1.0, "bfloat16": 0.5}, "bfloat16"),
    ],
)
def test_the_fastest_is_taken_if_it_gains_something(taken, wanted, monkeypatch):
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    monkeypatch.setattr(module, "screens", lambda device: [*taken])
    monkeypatch.setattr(module, "seconds", lambda x, W, matches, share, screen: taken[screen])
    assert fastest(X, W, 100) == (wanted, taken)


def test_nothing_is_measured_where_the_product_is_small(monkeypatch):
    monkeypatch.setattr(module, "seconds", lambda *args: pytest.fail("measured"))
    assert fastest(X, W, 100) == (None, {})
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    assert fastest(X.double(), W.double(), 100) == (None, {}), "a screen is for float32"


def test_a_machine_without_products_of_whole_numbers(monkeypatch):
    def fails(a, b):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch, "_int_mm", fails)
    assert screens(torch.device("cpu")) == [None, "bfloat16"]
    monkeypatch.undo()
    assert screens(torch.device("cuda")) == [None, "bfloat16"]


def test_what_is_measured_grows_with_the_work():
    """Seconds are of the whole product, whatever the piece that is timed."""
    for screen in screens(torch.device("cpu")):
        small, large = (module.seconds(X, torch.randn(n, 32), 100, 1.0, screen) for n in (4096, 16 * 4096))
        assert 4 < large / small < 64
        assert module.seconds(X, W, 100, 1.0, screen) > 0
