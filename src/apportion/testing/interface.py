"""Checks of what users call: shapes, dtypes, mistakes, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from apportion.testing.subject import D_IN, Subject, changed, difference, require, same, snapshot

LEADS = [(), (1,), (6,), (2, 3), (0,), (2, 0, 3)]


def leading_dimensions(s: Subject) -> None:
    """encode and decode restore leading dimensions; no rows and a single row are fine; in train and eval mode."""
    for sae in (s.ready(), s.ready().train()):
        mode = "train" if sae.training else "eval"
        for lead in LEADS:
            x = s.rows(int(torch.tensor(lead).prod())).reshape(*lead, *s.row_shape)
            latents = sae.encode(x)
            dense, x_hat = latents.dense(), sae(x)
            out = x_hat.shape[len(lead) :]
            require(latents.shape == lead, f"{mode}: encode of {list(x.shape)} has leading shape {latents.shape}")
            require(dense.shape == (*lead, sae.d_sae), f"{mode}: dense() of {list(x.shape)} is {list(dense.shape)}")
            require(latents.l0().shape == lead, f"{mode}: l0() of {list(x.shape)} is {list(latents.l0().shape)}")
            require(x_hat.shape[: len(lead)] == lead, f"{mode}: sae(x) of {list(x.shape)} is {list(x_hat.shape)}")
            require(out == (s.out_shape or s.row_shape), f"{mode}: a reconstructed row has shape {list(out)}")
            flat = sae.encode(x.reshape(-1, *s.row_shape))
            require(same(flat.dense().reshape(dense.shape), dense), f"{mode}: codes of {list(x.shape)} change if flat")


def codes_are_sparse_rows(s: Subject) -> None:
    """Codes are positive, zeros are dropped, indices ascend within a row, offsets delimit the rows."""
    for sae in (s.ready(), s.ready().train()):
        z = sae.encode(s.rows(50))
        require(z.nnz > 0, "no latent is active on any of 50 rows")
        require(bool((z.values > 0).all()), f"the smallest stored code is {z.values.min().item():g}, not above 0")
        require(bool(((z.indices >= 0) & (z.indices < sae.d_sae)).all()), "indices lie outside of 0..d_sae - 1")
        require(bool((z.offsets.diff() >= 0).all()) and int(z.offsets[-1]) == z.nnz, "offsets do not fit the values")
        order = z.rows() * sae.d_sae + z.indices
        require(bool((order.diff() > 0).all()), "indices do not ascend within rows")


def forward_is_decode_of_encode(s: Subject) -> None:
    """sae(x) = decode(encode(x), x); decode takes a dense code as well, and refuses one of another width."""
    for sae in (s.ready(), s.ready().train()):
        x = s.rows(6).reshape(2, 3, *s.row_shape)
        latents = sae.encode(x)
        wanted = sae.decode(latents, x)
        require(difference(sae(x), wanted) <= 1e-6, "sae(x) is not decode(encode(x), x)")
        require(difference(sae.decode(latents.dense(), x), wanted) <= 1e-6, "decode of the dense code differs")
        if not sae.decode_needs_x:
            require(difference(sae.decode(latents), wanted) <= 1e-6, "decode without x differs though x is not needed")
        else:
            refused("decode without the x that it needs", sae.decode, latents)
        refused("decode of a code of another width", sae.decode, latents.dense()[..., :-1], x)


def dtypes(s: Subject) -> None:
    """The reconstruction has the dtype of x, codes have that of the weights, which may also have 16 bits."""
    for weights in (torch.float32, torch.float64):
        sae = s.ready().to(weights)
        for given in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x = s.rows(6).to(given)
            latents = sae.encode(x)
            got = (sae(x).dtype, latents.values.dtype, sae.decode(latents, x).dtype)
            require(got == (given, weights, given), f"{given} in, {weights} weights: sae(x), codes, decode are {got}")
    x = s.rows(200)
    wanted = s.ready()(x)
    for weights in (torch.float16, torch.bfloat16):
        error = (s.ready().to(weights)(x) - wanted).square().mean() / wanted.square().mean()
        require(
            error.item() < 0.01, f"{weights} weights: reconstructions are off by {error.item():.2%} of their energy"
        )


def devices(s: Subject) -> None:
    """On a GPU, where there is one, the same codes and reconstructions as on the CPU."""
    if not torch.cuda.is_available():
        return
    sae, x = s.ready(torch.float64), s.rows(200).double()
    wanted, z = sae(x), sae.encode(x).dense()
    sae.cuda()
    on_gpu = sae.encode(x.cuda())
    require(on_gpu.values.is_cuda and sae(x.cuda()).is_cuda, "results are not on the device of the SAE")
    require(same(on_gpu.dense().cpu() != 0, z != 0), "another selection on the GPU")
    require(difference(sae(x.cuda()).cpu(), wanted) <= 1e-9, "another reconstruction on the GPU")


def wrong_width_is_refused(s: Subject) -> None:
    """Activations of another width raise ValueError wherever they enter."""
    sae, target = s.ready(), s.batch(5).target
    calls = {"encode": sae.encode, "sae(x)": sae, "calibrate": sae.calibrate}
    for shape in ((5, *s.row_shape[:-1], D_IN - 1), (D_IN - 1,), ()):
        for name, call in calls.items():
            refused(f"{name} of shape {list(shape)}", call, torch.ones(shape))
        refused(f"fit_input of shape {list(shape)}", sae.fit_input, torch.ones(shape), target)


def targets_are_needed_or_refused(s: Subject) -> None:
    """Training rows have a target if the SAE needs one, and must not have one otherwise: else ValueError."""
    sae, x = s.fitted(), s.rows(5)
    if s.out_shape is None:
        refused("a target that is not needed", sae.prepare, x, x)
    else:
        refused("a training row without its target", sae.prepare, x)
        refused("a target of another width", sae.prepare, x, torch.ones(5, s.out_shape[-1] + 1))


def nan_is_refused(s: Subject) -> None:
    """NaN and infinity raise ValueError in encode, sae(x) and calibrate, which then changes nothing."""
    for sae in (s.ready(), s.ready().train()):
        for bad in (torch.nan, torch.inf):
            x = s.rows(6)
            x[4].view(-1)[3] = bad
            before = snapshot(sae)
            for name, call in {"encode": sae.encode, "sae(x)": sae, "calibrate": sae.calibrate}.items():
                refused(f"{name} of rows with {bad}", call, x)
            require(not changed(before, sae), "calibrate refused the rows but changed the SAE")


def eval_mode_asks_for_calibration(s: Subject) -> None:
    """Without thresholds a rule that couples tokens refuses eval mode; nothing to calibrate from is refused too."""
    sae = s.fitted()
    refused("calibrate without rows", sae.calibrate, s.rows(0))
    if sae.allocation.batch_coupled:
        refused("encode in eval mode before calibration", sae.eval().encode, s.rows(4))


def encode_changes_nothing(s: Subject) -> None:
    """encode, decode and sae(x) leave parameters, buffers, info and mode alone, and give the same when called again."""
    for sae in (s.ready(), s.ready().train()):
        mode, before, info = sae.training, snapshot(sae), repr(sae.info)
        x, others = s.rows(20), 5 * s.rows(33, seed=5)
        first = sae.encode(x).dense()
        sae(others)
        require(same(sae.encode(x).dense(), first), "codes depend on what was encoded before")
        require(not (names := changed(before, sae)), f"encoding changed {', '.join(names)}")
        require(repr(sae.info) == info, "encoding changed sae.info")
        require(sae.training == mode, "encoding changed the mode")


def calibrate_keeps_mode_and_parameters(s: Subject) -> None:
    """calibrate restores train or eval mode and sets thresholds only; parameters keep their values."""
    for training in (True, False):
        sae = s.ready().train(training)
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        sae.calibrate(s.rows(1000, seed=6))
        modes = {m.training for m in sae.modules()}
        require(modes == {training}, f"after calibrate in {'train' if training else 'eval'} mode the modes are {modes}")
        moved = [name for name, p in sae.named_parameters() if not same(before[name], p.detach())]
        require(not moved, f"calibrate changed {', '.join(moved)}")


def refused(what: str, call: Callable[..., Any], *args: Any) -> None:
    """ValueError, with a message, is what users get for a mistake."""
    try:
        call(*args)
    except ValueError as error:
        require(len(str(error)) > 0, f"{what}: the ValueError says nothing")
        return
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__} instead of ValueError: {error}") from error
    raise AssertionError(f"{what} was not refused")
