"""The processes that make a training step together, as rules and losses see them.

A loss is made of sums over all tokens of the step, and only then of ratios, products and squares of them. `total` and
`mean` have the value of all processes everywhere, and the gradient of this process's own part, so that gradients,
summed over processes, are those of the whole batch.

`Group` itself is one process, for which nothing of this changes a bit. Several are a subclass of it.
"""

from __future__ import annotations

from torch import Tensor


class Group:
    """One process."""

    def total(self, part: Tensor) -> Tensor:
        """The sum over all processes, of the shape of `part`; gradients as above."""
        return part

    def count(self, number: int) -> int:
        """The sum of a whole number over all processes."""
        return number

    def highest(self, part: Tensor) -> Tensor:
        """The maximum over all processes, entry by entry. No gradients."""
        return part

    def mean(self, of_part: Tensor, number: int) -> Tensor:
        """The mean over everything, from the mean `of_part` of this process's `number` things."""
        return of_part

    def joined(self, part: Tensor) -> tuple[Tensor, slice]:
        """All processes' rows in their order, and which of them are this one's. No gradients."""
        return part, slice(None)


ALONE = Group()
