"""Whole contexts from a language model, for objectives that run the model on (`training.end_to_end`).

A batch holds every row of its contexts in order: `tokens` and `positions` say where one begins, and `mask` marks the
rows that pass the token filter. The others are there because the layers above need them; they are never trained on.

The contexts of an epoch are permuted as a whole, so the position is two numbers and resuming is exact. Samples and
held-out rows are filtered and shuffled as those of a `LiveSource`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from apportion.language.live import LiveSource
from apportion.rows.batch import Batch, in_float, joined
from apportion.rows.order import EpochOrder, check_same_source


class ContextSource(LiveSource):
    """A `LiveSource`, made from the same arguments, whose batches are whole contexts."""

    kind = "contexts"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not self.layout.is_usual:
            raise ValueError(
                f"contexts={self.layout.contexts!r}, attention={self.layout.attention!r}: whole contexts are packed, "
                "with attention to all and all roles"
            )
        self._order = EpochOrder(self._train, self.seed)

    @cached_property
    def num_rows(self) -> int:
        """Rows of all training contexts, those that the token filter leaves out included."""
        return len(self._train) * self.context_tokens

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        contexts, rest = divmod(batch_tokens, self.context_tokens)
        if rest or not 1 <= contexts <= len(self._train):
            raise ValueError(
                f"batch_tokens={batch_tokens} is no number of whole contexts: use a multiple of {self.context_tokens}, "
                f"at most {self.num_rows}"
            )
        for which, position in self._order.upcoming(contexts):
            self._order.position = position
            yield self._whole(which)

    def _whole(self, which: Int[Tensor, " n"]) -> Batch:
        """All rows of the contexts `which`, in order."""
        rows = joined(list(self._run(which)))
        return replace(in_float(rows), mask=self._mask(rows, self._seen))

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), **self._order.state_dict(), **self._medians()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_source(state, self._identity())
        self._order.load_state_dict(state)
        self._set_filters(state)
