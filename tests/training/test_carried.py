"""What an SAE carries from step to step is kept with a checkpoint."""

from __future__ import annotations

import signal

import pytest
import torch

import apportion as ap
from apportion.architectures import auxiliary

CONFIG = ap.TrainConfig(total_tokens=32 * 40, batch_tokens=32, lr=1e-2, dead_window_tokens=64, density_window_tokens=64)


def trainer() -> ap.Trainer:
    return ap.Trainer(ap.create("mutual_choice", d_in=8, d_sae=48, k=3, aux="aux_zipf", aux_c=1, seed=0), CONFIG)


def test_a_run_resumed_between_two_fits_of_the_curve_equals_one_in_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(auxiliary, "FIT_ALWAYS", 4)
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    whole = trainer().fit(x, tmp_path / "whole", progress=False)
    t = trainer()
    step = t.step

    def interrupted(batch):
        if t.steps == 25:  # the curve is of step 16
            signal.raise_signal(signal.SIGINT)
        return step(batch)

    monkeypatch.setattr(t, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        t.fit(x, tmp_path / "parts", progress=False)
    resumed = trainer().fit(x, tmp_path / "parts", resume=True, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    trained = trainer()
    trained.fit(x, progress=False)
    state = trained.learners[0].state()
    assert state["carried.curve"].shape == (48,)
    with pytest.raises(ValueError, match=r"carried\.curve"):
        trainer().learners[0].check_state(state | {"carried.curve": torch.zeros(3)})
