"""Training rows straight from a language model, without a cache on disk.

The training contexts are permuted anew in each epoch and cut into *blocks* of about `buffer_tokens` tokens. A block is
run through the model, filtered, shuffled as a whole and handed out; batches run on across the border of two blocks. A
batch of 2,048 rows from a block of 512 random contexts has about four rows of each, which is as good as independent.

The content of a block follows from (seed, epoch, number of the block), so the position is three small numbers. Resuming
runs the model again on the current block only and continues where it stopped, bit for bit on the same machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About, Language, TextRecord
from apportion.language.fingerprint import model_fingerprint, tokenizer_fingerprint
from apportion.language.hookpoints import expand
from apportion.language.model import check_context_tokens, check_finite, run_contexts
from apportion.language.precision import dtype_of
from apportion.language.tokens import begin_with_bos, check_ids, special_ids, vocabulary_size
from apportion.rows.batch import Batch, joined, regrouped
from apportion.rows.filter import FIT_ROWS, REASONS, TokenFilter, row_norms
from apportion.rows.order import check_same_source, held_out_groups, permutation, split_held_out


class LivePosition(NamedTuple):
    """`row` rows of block `block` of epoch `epoch` have been handed out."""

    epoch: int = 0
    block: int = 0
    row: int = 0


class LiveSource:
    """Rows of `contexts` [num_contexts, context_tokens] (see `read_contexts`), computed when they are needed."""

    makes_rows = True
    """And looks at them itself."""
    kind = "live"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        hookpoint: str,
        contexts: Any,
        *,
        buffer_tokens: int = 1 << 17,
        batch_contexts: int = 16,
        token_filter: TokenFilter | None = None,
        held_out_share: float = 0.1,
        seed: int = 0,
        text: TextRecord | Mapping[str, Any] | None = None,
    ) -> None:
        """`text` describes where the contexts come from (source, BOS policy); it is kept in the run's record."""
        contexts = torch.as_tensor(contexts)
        check_ids(contexts, vocabulary_size(model), "contexts")
        names = expand(model, hookpoint)
        if len(names) > 1:
            raise ValueError(f"hookpoint {hookpoint!r} stands for {len(names)} modules: a source has one, name it")
        if batch_contexts < 1 or buffer_tokens < contexts.shape[1]:
            raise ValueError(
                f"batch_contexts={batch_contexts}, buffer_tokens={buffer_tokens} hold no context of "
                f"{contexts.shape[1]} tokens: use larger numbers"
            )
        check_context_tokens(model, contexts.shape[1])
        self.model, self.tokenizer, self.hookpoint, self.contexts = model, tokenizer, names[0], contexts
        self.batch_contexts, self.seed, self.held_out_share = batch_contexts, seed, held_out_share
        self.block_contexts = buffer_tokens // contexts.shape[1]
        is_held_out = held_out_groups(len(contexts), held_out_share)
        self._train = (~is_held_out).nonzero().squeeze(1)
        self._held_out = split_held_out(is_held_out)[0].nonzero().squeeze(1)
        self._special_ids = special_ids(tokenizer)
        self._settings = token_filter or TokenFilter()
        self._filter: TokenFilter | None = None
        self._filtered = dict.fromkeys(REASONS, 0)
        self._rows_seen = 0
        self._text = text if isinstance(text, TextRecord) else TextRecord.from_json(text or {}, "text")
        self.d_in = run_contexts(model, names, contexts[:1, :2], whole=True)[self.hookpoint].shape[1]
        self._position = LivePosition()

    @cached_property
    def num_rows(self) -> int:
        """Training rows per epoch, before norm outliers are left out: which rows those are shows only as they come."""
        tokens = self.contexts[self._train]
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        beforehand = replace(self._settings, norm_outlier=None, special_ids=self._special_ids)
        return int(beforehand.mask(torch.zeros(*tokens.shape, 1), tokens, positions).sum())

    @property
    def filter(self) -> TokenFilter:
        """The token filter, fitted on the first training contexts of the text when it is first needed."""
        if self._filter is None:
            num_contexts = -(-FIT_ROWS // self.contexts.shape[1])
            norms = [replace(part, x=row_norms(part.x)[:, None]) for part in self._run(self._train[:num_contexts])]
            rows = joined(norms)
            assert rows.tokens is not None and rows.positions is not None
            self._filter = self._settings.fit(rows.x[:, 0], rows.tokens, rows.positions, self._special_ids)
        return self._filter

    def _run(self, which: Int[Tensor, " n"]) -> Iterator[Batch]:
        """All rows of the contexts `which`, a few contexts at a time."""
        for chosen in which.long().split(self.batch_contexts):
            ids = self.contexts[chosen]
            x = run_contexts(self.model, [self.hookpoint], ids)[self.hookpoint]
            check_finite(self.hookpoint, x, ids, chosen.tolist(), self.tokenizer)
            positions = torch.arange(ids.shape[1], device=x.device).repeat(len(ids))
            yield Batch(x, tokens=ids.flatten().to(x.device), positions=positions)

    def _filtered_rows(self, which: Int[Tensor, " n"]) -> Batch:
        """The rows of the contexts `which` that pass the filter."""
        return joined([rows[self._mask(rows)] for rows in self._run(which)])

    def _mask(self, rows: Batch) -> Bool[Tensor, " n"]:
        """True for the rows that pass the filter; the others are counted."""
        self._rows_seen += len(rows)
        assert rows.tokens is not None and rows.positions is not None
        return self.filter.counted(row_norms(rows.x), rows.tokens, rows.positions, self._filtered)

    def _blocks(self, epoch: int, first: int) -> Iterator[Batch]:
        """The blocks of an epoch from number `first` on, each shuffled."""
        order = self._train[permutation(len(self._train), self.seed, epoch).long()]
        for block, which in list(enumerate(order.split(self.block_contexts)))[first:]:
            rows = self._filtered_rows(which)
            yield rows[permutation(len(rows), self.seed, epoch, "block", block).long().to(rows.x.device)]

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        if not 1 <= batch_tokens <= self.num_rows:
            raise ValueError(
                f"batch_tokens={batch_tokens} does not fit {self.num_rows} training rows: use a number "
                f"between 1 and {self.num_rows}, or more text"
            )
        epoch, block, row = self._position
        while True:
            delivered = 0
            for rows, number, end in regrouped(self._blocks(epoch, block), batch_tokens, row):
                self._position, delivered = LivePosition(epoch, block + number, end), delivered + 1
                yield replace(rows, x=rows.x.float())
            if not delivered and block == row == 0:
                raise ValueError(
                    f"an epoch has fewer than batch_tokens={batch_tokens} rows left by the token filter: "
                    "use a smaller batch_tokens or more text"
                )
            epoch, block, row = epoch + 1, 0, 0

    def sample(self, n: int) -> Batch:
        """Random rows of about as many random contexts as are needed for `n` rows."""
        return Batch(torch.cat(list(self._draw(self._train, n, "sample"))))

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        for rows in self._draw(self._held_out, max_rows, "held out"):
            yield from map(Batch, rows.split(chunk))

    def _draw(self, contexts: Int[Tensor, " n"], max_rows: int, key: str) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Rows of random `contexts` in random order, a block of contexts at a time, until there are `max_rows`."""
        order = contexts[permutation(len(contexts), self.seed, key).long()]
        while max_rows > 0 and len(order):
            num_contexts = min(self.block_contexts, 1 + max_rows * 5 // (4 * self.contexts.shape[1]))
            rows = self._filtered_rows(order[:num_contexts]).x
            rows = rows[permutation(len(rows), self.seed, key, "rows").long()[:max_rows].to(rows.device)]
            yield rows.float()
            order, max_rows = order[num_contexts:], max_rows - len(rows)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a position to mean the same rows."""
        return {
            "seed": self.seed,
            "num_contexts": len(self.contexts),
            "block_contexts": self.block_contexts,
            "batch_contexts": self.batch_contexts,
            "held_out_share": self.held_out_share,
        }

    def state_dict(self) -> dict[str, Any]:
        median = None if self._filter is None else self._filter.median_norm
        return {**self._position._asdict(), **self._identity(), "median_norm": median}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_source(state, self._identity())
        self._position = LivePosition(state["epoch"], state["block"], state["row"])
        if state["median_norm"] is not None:
            self._filter = replace(self._settings, median_norm=state["median_norm"], special_ids=self._special_ids)

    def describe(self) -> About:
        return About(
            kind=self.kind,
            hookpoint=self.hookpoint,
            d_in=self.d_in,
            dtype=dtype_of(self.model),
            filter=self.filter.to_dict(),
            median_norm=self.filter.median_norm,
            filtered=dict(self._filtered),
            filtered_share=sum(self._filtered.values()) / max(1, self._rows_seen),
            rows_seen=self._rows_seen,
            rows_train=self.num_rows,
            rows_calibrate=len(self._held_out) * self.contexts.shape[1],
            held_out_share=self.held_out_share,
            seed=self.seed,
            language=Language(
                model=model_fingerprint(self.model),
                model_dtype=dtype_of(self.model),
                tokenizer=tokenizer_fingerprint(self.tokenizer),
                text=replace(self._text, contexts=len(self.contexts)),
                bos_prepended=begin_with_bos(self.tokenizer, self.contexts),
                context_tokens=self.contexts.shape[1],
            ),
        )
