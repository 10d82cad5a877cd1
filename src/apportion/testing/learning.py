"""Checks of training: gradients, determinism, and that it helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from apportion.allocation import StepContext
from apportion.architectures import SAE
from apportion.metrics import FVU
from apportion.rows.batch import ArraySource
from apportion.testing.subject import D_SAE, K, Subject, changed, require, snapshot
from apportion.training import TrainConfig, Trainer

STEP = 1e-6
"""Of finite differences, in float64."""
TOLERANCE = 1e-5
"""Relative, of a directional derivative."""
ESTIMATE_STEP, ESTIMATE_TOLERANCE = 0.05, 0.25
"""For gradients that are estimates: step of the finite difference, and tolerance, wide because windows have a width."""
ROWS, BATCH, STEPS = 8192, 128, 120
"""Of a training run: under a second."""


Terms = Callable[..., dict[str, Tensor]]
"""All loss terms of parameters as they are; with a name, those that the term's finite differences are made of."""


def gradients_of_losses(s: Subject) -> None:
    """Every loss term has the gradient that finite differences show on fixed matches, for every trained parameter.

    What `SAE.constants` says a term holds constant (an auxiliary loss its error, say) is so here too; everything else
    moves. A rule's own parameters are left to `gradients_of_rules`. Not for an SAE that stops gradients within its
    forward pass.
    """
    sae = s.fitted(torch.float64)
    of_rule = {id(p) for p in sae.allocation.parameters()}
    trained = {n: p for n, p in sae.named_parameters() if p.requires_grad and id(p) not in of_rule}
    terms = loss_terms(sae, s, tokens=5)
    for term, gradients in all_gradients(terms, trained).items():
        for name, p in trained.items():
            compare(terms, term, name, p, gradients[name])


def gradient_to_the_input(s: Subject) -> None:
    """The gradient of sae(x) with respect to x is that of finite differences."""
    sae = s.ready(torch.float64)
    x = s.rows(4).double()
    weights = torch.randn(sae(x).shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((sae(leaf) * weights).sum(), leaf, materialize_grads=True)
    compare(lambda _=None: {"sae(x)": (sae(x) * weights).sum()}, "sae(x)", "x", x, gradient)


def gradients_of_rules(s: Subject) -> None:
    """The gradient of a rule's own parameters is nearly the derivative of the mean loss over many rows.

    Selection is a step function of them, so on few rows a loss does not change with them at all: straight-through
    gradients estimate the change of the expectation.
    """
    sae = s.fitted(torch.float64)
    own = {n: p for n, p in sae.named_parameters() if n.startswith("allocation.") and p.requires_grad}
    if not own:
        return
    terms = loss_terms(sae, s, tokens=40_000)
    for term, gradients in all_gradients(terms, own).items():
        for name, p in own.items():
            uphill = torch.where(gradients[name] < 0, -1.0, 1.0).to(p)
            slope = central_difference(terms, term, p, uphill, ESTIMATE_STEP)
            got = gradients[name].abs().sum().item()
            require(
                abs(got - slope) <= ESTIMATE_TOLERANCE * max(got, abs(slope)),
                f"{term}: the gradient of {name} promises a slope of {got:.4g}; over many rows it is {slope:.4g}",
            )


def loss_terms(sae: SAE, s: Subject, tokens: int) -> Terms:
    """All losses of a training step, of parameters as they are; silent latents are dead.

    With the name of a term, what that term declares to be constant keeps the value that it has now.
    """
    batch = s.batch(tokens)
    target = None if batch.target is None else batch.target.double()
    with torch.no_grad():
        x, _ = sae.prepare(batch.x.double(), target)
        dead = sae.encode_scaled(x, sae.selection()).counts() == 0
        density = torch.where(dead, 0.0, K / D_SAE).double()
        context = StepContext(progress=0.5, batch_tokens=tokens, dead=dead, density=density, l0=float(K))
        sae.begin_step(context)
        made_now = sae.forward_scaled(x, context)
        now = {name: p.clone() for name, p in sae.named_parameters()}
    for term, constants in sae.constants.items():
        unknown = set(constants) - now.keys() - {"made"}
        require(not unknown, f"the constants of {term}, {', '.join(sorted(unknown))}, are no parameters")

    def terms(of: str | None = None) -> dict[str, Tensor]:
        constants = sae.constants.get(of or "", ())
        x, y = sae.prepare(batch.x.double(), target)
        made = made_now if "made" in constants else sae.forward_scaled(x, context)
        with replaced(sae, {name: now[name] for name in constants if name != "made"}):
            own = sae.own_terms(x, y, made, context)
        return {"reconstruction": sae.reconstruction_loss(y, made)} | own

    return terms


@contextmanager
def replaced(sae: SAE, values: dict[str, Tensor]) -> Iterator[None]:
    """Within the block these parameters have these values."""
    before = {name: sae.get_parameter(name).detach().clone() for name in values}
    sae.load_state_dict(values, strict=False)
    try:
        yield
    finally:
        sae.load_state_dict(before, strict=False)


def all_gradients(terms: Terms, parameters: dict[str, torch.nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Of every term, for every parameter: zeros where it has none."""
    found = {}
    for term, value in terms().items():
        if value.requires_grad and parameters:
            grads = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, materialize_grads=True)
        else:
            grads = [torch.zeros_like(p) for p in parameters.values()]
        found[term] = dict(zip(parameters, grads, strict=True))
    return found


def compare(terms: Terms, term: str, name: str, p: Tensor, gradient: Tensor) -> None:
    """Raise unless the gradient along a random direction is the slope. A kink in the way is given a second chance."""
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        slope = central_difference(terms, term, p, direction, STEP)
        got = (gradient * direction).sum().item()
        noise = TOLERANCE * gradient.norm().item() + 1e-8 * abs(terms(term)[term].item())
        if abs(got - slope) <= noise:
            return
    require(False, f"{term}: the gradient of {name} is {got:.8g} along a direction in which the slope is {slope:.8g}")


@torch.no_grad()
def central_difference(terms: Terms, term: str, p: Tensor, direction: Tensor, step: float) -> float:
    values, before = [], p.clone()
    for sign in (1, -1):
        p.add_(direction, alpha=sign * step)
        values.append(terms(term)[term].item())
        p.copy_(before)
    return (values[0] - values[1]) / (2 * step)


def determined_by_the_seed(s: Subject) -> None:
    """The same seed gives the same SAE, and the same training the same result, bit for bit."""
    one, other = s.fresh(), s.fresh()
    require(not (names := changed(snapshot(one), other)), f"equal seeds, different {', '.join(names)}")
    for sae in (one, other):
        trainer = Trainer(sae, TrainConfig(lr=1e-2, batch_tokens=64, total_tokens=640))
        if not trainer.trains:
            return
        for seed in range(5):
            trainer.step(s.batch(64, seed))
    require(not (names := changed(snapshot(one), other)), f"equal training, different {', '.join(names)}")


def training_steps(s: Subject) -> None:
    """step takes any number of rows, returns finite numbers, `loss` the sum of its terms, and moves every parameter."""
    sae = s.fitted()
    before = snapshot(sae)
    trainer = Trainer(sae, TrainConfig(lr=1e-2, batch_tokens=64, total_tokens=640))
    if not trainer.trains:
        return
    for n in (64, 64, 1, 33):
        out = trainer.step(s.batch(n, seed=n))
        told = {name: value for name, value in out.items() if n > 1 or name != "fvu_batch"}  # one row has no variance
        odd = [f"{name} = {value}" for name, value in told.items() if value.ndim or not bool(value.isfinite())]
        require(not odd, f"a step on {n} rows returned {', '.join(odd)}")
        terms = [v for name, v in out.items() if name not in {"loss", "fvu_batch", "l0", "dead", "grad_norm", "lr"}]
        total = torch.stack(terms).sum().item()
        require(
            abs(total - out["loss"].item()) <= 1e-5 * abs(total), f"loss is {out['loss']:.6g}, its terms {total:.6g}"
        )
    moved = changed(before, sae)
    for name, p in sae.named_parameters():
        require(
            p.requires_grad == (name in moved), f"{name} {'did not move' if p.requires_grad else 'moved'} in training"
        )


def training_helps(s: Subject) -> None:
    """Trained for a moment, FVU in eval mode is well below that of the untrained SAE, of the mean (which is 1) and of
    the same SAE with its random decoder frozen.

    SAEs that have nothing to train, or a part that is not trained, are baselines themselves and are let off.
    """
    if not any(p.requires_grad for p in s.fresh().parameters()):
        return
    trained = fvu(train(s.fresh(), s), s)
    untrained = s.fresh()
    batch = s.batch(1000, seed=1)
    untrained.fit_input(batch.x, batch.target)
    untrained.calibrate(s.rows(2000, seed=3))
    start = fvu(untrained.eval(), s)
    require(trained <= 0.8 * min(start, 1.0), f"FVU {trained:.3f} after training, {start:.3f} before")
    frozen = s.fresh()
    if all(p.requires_grad for p in frozen.parameters()) and "W_dec" in dict(frozen.named_parameters()):
        frozen.get_parameter("W_dec").requires_grad_(False)
        random = fvu(train(frozen, s), s)
        require(trained <= 0.9 * random, f"FVU {trained:.3f}, and {random:.3f} with a frozen random decoder")


def train(sae: SAE, s: Subject) -> SAE:
    batch = s.batch(ROWS, seed=10)
    config = TrainConfig(lr=1e-2, batch_tokens=BATCH, total_tokens=BATCH * STEPS)
    return Trainer(sae, config).fit(ArraySource(batch.x, target=batch.target), progress=False)


@torch.no_grad()
def fvu(sae: SAE, s: Subject) -> float:
    """Of rows that were not trained on."""
    batch, measured = s.batch(2000, seed=11), FVU()
    y = batch.x if batch.target is None else batch.target
    measured.add(y.flatten(1), sae(batch.x).flatten(1))
    return measured.value()
