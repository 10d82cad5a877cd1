"""Checks of copies: folded to raw units, saved in our format, exported to those of other libraries."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from apportion.architectures import SAE
from apportion.architectures.inputs import PER_TOKEN
from apportion.interop.export import OURS, export, unit, writable
from apportion.interop.load import load
from apportion.testing.subject import Subject, changed, difference, require, same, snapshot

REMEDY = "sae.save"
"""What is left where no other format fits; a refusal says so."""


def saved_is_loaded(s: Subject) -> None:
    """ap.load gives back what save wrote, bit for bit, in eval mode; the folded copy can be saved as well."""
    originals = [s.ready(), s.ready(torch.float64)]
    folded = folded_or_none(originals[0])
    for sae in [*originals, *([] if folded is None else [folded])]:
        with TemporaryDirectory() as folder:
            sae.save(Path(folder) / "sae")
            loaded = load(Path(folder) / "sae")
        require(loaded.name == sae.name, f"loaded a {loaded.name}, saved a {sae.name}")
        require(not loaded.training, "load does not return eval mode")
        require(loaded.settings() == sae.settings(), "settings differ after loading")
        require(loaded.info == sae.info, "info differs after loading")
        require(not (names := changed(snapshot(sae), loaded)), f"tensors differ after loading: {', '.join(names)}")
        frozen = [p.requires_grad for p in sae.parameters()]
        require([p.requires_grad for p in loaded.parameters()] == frozen, "other parameters are trained after loading")
        x = s.rows(50).to(sae.dtype)
        require(same(loaded.encode(x).dense(), sae.encode(x).dense()), "codes differ after loading")
        require(same(loaded(x), sae(x)), "reconstructions differ after loading")


def folding(s: Subject) -> None:
    """folded() takes raw rows: equal reconstructions, codes 1/s times as large, to 1e-5 of the largest entry.

    With several scales s is their geometric mean. Only an SAE that normalises each token may refuse, with ValueError.
    """
    sae = s.ready(torch.float64)
    before = snapshot(sae)
    folded = folded_or_none(sae)
    require(not (names := changed(before, sae)), f"folded() changed {', '.join(names)} of the SAE itself")
    if folded is None:
        return
    require(folded.config.input_norm == "none" and not folded.training, "the folded SAE is not a raw one in eval mode")
    x = s.rows(300).double()
    z, raw = sae.encode(x).dense(), folded.encode(x).dense()
    require(same(z != 0, raw != 0), "other matches after folding")
    factor = 1 / sae.scale.double().log().mean().exp()
    require(difference(raw, factor * z) <= 1e-5, f"codes are not {factor.item():.4g} times as large after folding")
    require(difference(folded(x), sae(x)) <= 1e-5, "reconstructions differ after folding")


def exported_is_loaded(s: Subject) -> None:
    """What ap.export writes in any format, ap.load reads: the same matches and reconstructions, codes in raw units.

    Ours holds every SAE. A format of another library may refuse one, with a ValueError that names `sae.save` as what
    is left, and without leaving anything behind; all of them may, if none has this architecture.
    """
    sae = s.ready(torch.float64)
    before = snapshot(sae)
    x = s.rows(100).double()
    z, x_hat = sae.encode(x).dense(), sae(x)
    for format in writable():
        loaded = exported(sae, format)
        require(not (names := changed(before, sae)), f"exporting to {format} changed {', '.join(names)} of the SAE")
        if loaded is None:
            require(format != OURS, "our own format cannot hold this SAE")
            continue
        require(not loaded.training, f"{format}: load does not return eval mode")
        wanted, found = z if format == OURS else z * unit(sae), loaded.encode(x).dense()
        require(same(found != 0, z != 0), f"{format}: other matches after export")
        require(difference(found, wanted) <= 1e-5, f"{format}: codes differ after export")
        require(difference(loaded(x), x_hat) <= 1e-5, f"{format}: reconstructions differ after export")


def exported(sae: SAE, format: str) -> SAE | None:
    """The SAE that is in the files of this format, or None where the format refuses it."""
    with TemporaryDirectory() as folder:
        target = Path(folder) / "sae"
        try:
            export(sae, target, format)
        except ValueError as error:
            require(REMEDY in str(error), f"{format} refused without a remedy ({REMEDY}): {error}")
            require(not any(Path(folder).iterdir()), f"{format} refused and left files behind")
            return None
        return load(target)


def folded_or_none(sae: SAE) -> SAE | None:
    """The folded copy, or None where each token is normalised and folding is refused for that."""
    try:
        return sae.folded()
    except ValueError as error:
        require(sae.input.kind in PER_TOKEN, f"folded() refused, though input_norm is {sae.input.kind}: {error}")
        return None
