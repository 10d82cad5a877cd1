"""What is said to somebody who names what there is not: an SAE, its rule of allocation, a training objective.

The tables are given: the command line has them without importing what they name (cli/options.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from apportion.settings import nearest


def sae(name: str, known: Iterable[str]) -> str:
    """The name, if it is known."""
    if name not in (known := [*known]):
        raise ValueError(f"There is no SAE named {name!r}; {nearest(name, known)}")
    return name


def rule(
    allocation: str, own: str, reasons: Mapping[str, str | None], with_choice: Iterable[str], training: bool = True
) -> str:
    """The name of a rule, if an SAE may have it. `own`: the rule that it has by itself. `reasons`: of every rule, why
    it is not for `training`, if it is not. `with_choice`: if its own is all it can have, SAEs that have a choice."""
    if with_choice := [*with_choice]:
        raise ValueError(
            f"allocation = {allocation!r} is not for this SAE, whose rule is always {own}. "
            f"SAEs with a choice: {', '.join(with_choice)}."
        )
    if allocation not in [*reasons]:
        raise ValueError(
            f"There is no allocation {allocation!r} to choose; {nearest(str(allocation), to_train(reasons))}"
        )
    if training and (reason := reasons[allocation]):
        raise ValueError(
            f"allocation = {allocation!r} cannot be chosen: {allocation} {reason}. "
            f"To choose from: {', '.join(to_train(reasons))}."
        )
    return allocation


def to_train(reasons: Mapping[str, str | None]) -> list[str]:
    """The rules that a new SAE can have."""
    return [name for name, reason in reasons.items() if reason is None]


def objective(name: str, known: Iterable[str]) -> str:
    """The name, if it is known."""
    if name not in (known := [*known]):
        raise ValueError(f"There is no training objective {name!r}. Known are: {', '.join(known)}.")
    return name
