"""The conformance suite: what every sparse autoencoder promises, as small named checks that anybody can run.

    from functools import partial
    import apportion as ap

    ap.testing.check_sae(partial(ap.create, "mutual_choice"))
    ap.testing.check_sae(MySAE.make, only="folding")

A factory is called as factory(d_in=, d_sae=, k=) and returns a fresh SAE; an SAE of your own that is to pass
`saved_is_loaded` and `exported_is_loaded` has its line in `ap.SAES`. Each check is a function of a `Subject`, its
docstring says what is promised, and it raises AssertionError with the reason if the promise is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from apportion.architectures import SAE
from apportion.testing import files, interface, learning, selection
from apportion.testing.subject import Subject

CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        interface.leading_dimensions,
        interface.codes_are_sparse_rows,
        interface.forward_is_decode_of_encode,
        interface.dtypes,
        interface.devices,
        interface.wrong_width_is_refused,
        interface.nan_is_refused,
        interface.targets_are_needed_or_refused,
        interface.eval_mode_asks_for_calibration,
        interface.encode_changes_nothing,
        interface.calibrate_keeps_mode_and_parameters,
        files.saved_is_loaded,
        files.folding,
        files.exported_is_loaded,
        selection.the_setting_k,
        selection.budget_in_training,
        selection.selection_equals_reference,
        selection.decode_adds_up,
        selection.training_pass_is_encode,
        selection.independent_of_the_batch,
        selection.independent_of_the_batch_with_ties,
        selection.calibration_hits_k,
        learning.gradients_of_losses,
        learning.gradient_to_the_input,
        learning.gradients_of_rules,
        learning.determined_by_the_seed,
        learning.training_steps,
        learning.training_helps,
    )
}
"""All checks by name, the cheap ones first."""


def check_sae(factory: Callable[..., SAE], *, only: str | Iterable[str] | None = None) -> None:
    """Run all checks, or those named in `only`, and raise one AssertionError that says which failed and why.

    ValueError for a check that does not exist.
    """
    names = list(CHECKS) if only is None else [only] if isinstance(only, str) else list(only)
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"There is no check {name!r}; the checks are: {', '.join(CHECKS)}.")
    subject = Subject(factory)
    failed = []
    for name in names:
        try:
            CHECKS[name](subject)
        except AssertionError as error:
            failed.append(f"{name}: {error}")
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    if failed:
        raise AssertionError("\n".join([f"{len(failed)} of {len(names)} checks failed", *failed]))


__all__ = ["CHECKS", "Subject", "check_sae"]
