"""Annotations of the package, shapes among them, are checked while the tests run in CI (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError, config

from apportion.allocation import reference
from apportion.latents import Latents
from apportion.metrics import batch_fvu
from apportion.rows.order import EpochOrder


@pytest.fixture(autouse=True)
def checks_are_on() -> Iterator[None]:
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", False)
    yield
    config.update("jaxtyping_disable", before)


def latents(indices: torch.Tensor) -> Latents:
    return Latents(torch.ones(2), indices, torch.tensor([0, 1, 2]), 4, (2,))


WRONG: dict[str, Callable[[], Any]] = {
    "a width that torch repeats": lambda: batch_fvu(torch.ones(3, 4), torch.zeros(3, 1)),
    "a threshold that torch repeats": lambda: reference.threshold(torch.ones(3, 4), torch.ones(1)),
    "whole numbers": lambda: reference.threshold(torch.ones(3, 4).int(), 0.5),
    "a field of a dataclass": lambda: latents(torch.ones(2)),
    "a method": lambda: latents(torch.tensor([0, 1])).with_values(torch.ones(2).int()),
    "a class": lambda: EpochOrder(torch.arange(3), 1.5),  # type: ignore[arg-type]
}
"""What would otherwise pass."""


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_an_annotation_does_not_admit_is_an_error(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeCheckError):
        call()


def test_a_mistake_that_is_refused_in_words_is_no_error_of_annotations() -> None:
    with pytest.raises(ValueError, match="for each of the 2 matches"):
        latents(torch.tensor([0, 1])).with_values(torch.ones(3))


def test_what_it_admits_is_none() -> None:
    assert batch_fvu(torch.eye(4), torch.eye(4)) == 0
    assert latents(torch.tensor([0, 1])).with_values(torch.ones(2)).nnz == 2
