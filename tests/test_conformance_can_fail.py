"""Checks of the conformance suite can fail: for each there is a broken SAE that it is meant for."""

from __future__ import annotations

from functools import partial

import pytest
from broken_saes import BROKEN, ForwardGoesItsOwnWay

import apportion as ap
from apportion.testing import CHECKS, check_sae


@pytest.mark.parametrize(("broken", "check"), BROKEN.items(), ids=lambda b: b if isinstance(b, str) else b[0].__name__)
def test_a_broken_sae_is_caught(broken: tuple[type, str], check: str) -> None:
    cls, name = broken

    def factory(**sizes: int) -> ap.SAE:
        sae = ap.create(name, **sizes)
        sae.__class__ = cls
        return sae

    with pytest.raises(AssertionError, match=f"1 of 1 checks failed\n{check}: "):
        check_sae(factory, only=check)


def test_needing_thresholds_cannot_be_forgotten() -> None:
    def factory(**sizes: int) -> ap.SAE:
        sae = ap.create("mutual_choice", **sizes)
        sae.allocation.threshold.fill_(0.0)
        return sae

    with pytest.raises(AssertionError, match="encode in eval mode before calibration was not refused"):
        check_sae(factory, only="eval_mode_asks_for_calibration")


def test_every_check_is_known_to_fail() -> None:
    without_a_toy = {"devices", "eval_mode_asks_for_calibration"}  # needs a GPU; has the test above
    assert set(BROKEN.values()) | without_a_toy == set(CHECKS)


def test_all_failures_are_told_together() -> None:
    def factory(**sizes: int) -> ap.SAE:
        sae = ap.create("topk", **sizes)
        sae.__class__ = ForwardGoesItsOwnWay
        return sae

    with pytest.raises(AssertionError) as told:
        check_sae(
            factory, only=["dtypes", "forward_is_decode_of_encode", "decode_adds_up", "folding", "saved_is_loaded"]
        )
    text = str(told.value)
    assert text.startswith("2 of 5 checks failed") and "saved_is_loaded: " in text
    assert "forward_is_decode_of_encode: sae(x) is not decode(encode(x), x)" in text


def test_a_crash_is_a_failure_and_a_wrong_name_a_mistake() -> None:
    def factory(**sizes: int) -> ap.SAE:
        sae = ap.create("topk", **sizes)
        sae.decode = lambda *_: 1 / 0  # type: ignore[method-assign]
        return sae

    with pytest.raises(AssertionError, match="decode_adds_up: ZeroDivisionError"):
        check_sae(factory, only="decode_adds_up")
    with pytest.raises(ValueError, match=r"no check 'fold'; the checks are: .*folding"):
        check_sae(partial(ap.create, "topk"), only="fold")


def test_checks_explain_themselves() -> None:
    assert all((check.__doc__ or "").strip() for check in CHECKS.values())
