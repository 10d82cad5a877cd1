"""Training rows straight from a language model, without a cache on disk.

The training contexts are permuted anew in each epoch and cut into *blocks* of about `buffer_tokens` tokens. A block is
run through the model, filtered, shuffled as a whole and handed out; batches run on across the border of two blocks. A
batch of 2,048 rows from a block of 512 random contexts has about four rows of each, which is as good as independent.

The content of a block follows from (seed, epoch, number of the block), so the position is three small numbers. Resuming
runs the model again on the current block only and continues where it stopped, bit for bit on the same machine. The
next block may be made by a thread while the current one is handed out (`look_ahead`), which changes no row and no
count: what is known of a block counts when its turn comes.

Sources of one model over the same contexts share its passes (captured.py). With a `target_hookpoint` each row has as
its target the activation of the same token there; a token takes part only if the filter of both keeps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About, Language, Site, TextRecord
from apportion.language.captured import Captured
from apportion.language.document_layout import Layout, ids_of, labels_of, num_rows
from apportion.language.fingerprint import model_fingerprint, tokenizer_fingerprint
from apportion.language.hookpoints import expand
from apportion.language.model import check_context_tokens, run_contexts
from apportion.language.precision import dtype_of
from apportion.language.tokens import begin_with_bos, check_ids, special_ids, vocabulary_size
from apportion.rows.batch import Batch, in_float, joined, regrouped
from apportion.rows.filter import FIT_ROWS, REASONS, TokenFilter, row_norms
from apportion.rows.order import check_same_source, held_out_groups, permutation, split_held_out

MEDIANS = ("median_norm", "target_median_norm")
"""Where a state has the median norm of each hookpoint."""


class LivePosition(NamedTuple):
    """`row` rows of block `block` of epoch `epoch` have been handed out."""

    epoch: int = 0
    block: int = 0
    row: int = 0


@dataclass
class Seen:
    """Of some rows: how many there were, took part, and were left out by the filter of each hookpoint, by reason."""

    rows: int = 0
    kept: int = 0
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, other: Seen) -> None:
        self.rows += other.rows
        self.kept += other.kept
        self.left_out.update(other.left_out)

    def without(self, other: Seen) -> dict[str, Any]:
        """What is left of the counts, JSON-able; `of_state` reads it."""
        left_out = [[*key, count - other.left_out[key]] for key, count in self.left_out.items()]
        return {"rows": self.rows - other.rows, "kept": self.kept - other.kept, "left_out": left_out}

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Seen:
        left_out = Counter({(name, reason): count for name, reason, count in state["left_out"]})
        return Seen(state["rows"], state["kept"], left_out)


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
        target_hookpoint: str | None = None,
        captured: Captured | None = None,
        layout: Layout | None = None,
        look_ahead: bool | None = None,
    ) -> None:
        """`text` describes where the contexts come from (source, BOS policy); it is kept in the run's record. Contexts
        may have more than their ids, and their `layout` (document_layout.py).

        `captured` has the model's passes over these contexts, if others read them too. `look_ahead` makes the next
        block, of which memory must then hold two, while the current one is handed out; default: where the model does
        not run on the CPU, which would take the time from training.
        """
        contexts, self.layout = torch.as_tensor(contexts), layout or Layout()
        check_ids(ids_of(contexts), vocabulary_size(model), "contexts")
        self.context_tokens = contexts.shape[-1]
        self.hookpoint = _one(model, hookpoint)
        self.target_hookpoint = None if target_hookpoint is None else _one(model, target_hookpoint)
        if self.target_hookpoint == self.hookpoint:
            raise ValueError(f"a source cannot have {hookpoint!r} both as its rows and as their target: name another")
        self._names = [name for name in (self.hookpoint, self.target_hookpoint) if name is not None]
        if batch_contexts < 1 or buffer_tokens < self.context_tokens:
            raise ValueError(
                f"batch_contexts={batch_contexts}, buffer_tokens={buffer_tokens} hold no context of "
                f"{self.context_tokens} tokens: use larger numbers"
            )
        check_context_tokens(model, self.context_tokens)
        self.model, self.tokenizer, self.contexts = model, tokenizer, contexts
        self.batch_contexts, self.seed, self.held_out_share = batch_contexts, seed, held_out_share
        self.block_contexts = buffer_tokens // self.context_tokens
        is_held_out = held_out_groups(len(contexts), held_out_share)
        self._train = (~is_held_out).nonzero().squeeze(1)
        self._held_out, self._unseen = (part.nonzero().squeeze(1) for part in split_held_out(is_held_out))
        self._special_ids = special_ids(tokenizer)
        self._settings = token_filter or TokenFilter()
        self._filters: dict[str, TokenFilter] = {}
        self._seen, self._in_hand = Seen(), Seen()
        """Of all blocks so far, and of the one that is handed out: what the first is without the second follows from
        the position."""
        self._text = text if isinstance(text, TextRecord) else TextRecord.from_json(text or {}, "text")
        first = run_contexts(model, self._names, ids_of(contexts)[:1, :2], whole=True)
        self._widths = {name: x.shape[1] for name, x in first.items()}
        self.d_in, self.d_out = self._widths[self.hookpoint], self._widths.get(self.target_hookpoint or "")
        self._reader = (captured or Captured(model, tokenizer, contexts, layout=self.layout)).reader(self._names)
        self.look_ahead = first[self.hookpoint].device.type != "cpu" if look_ahead is None else look_ahead
        self._position = LivePosition()

    @cached_property
    def num_rows(self) -> int:
        """Training rows per epoch, before norm outliers are left out: which rows those are shows only as they come."""
        tokens, positions, _ = labels_of(self.contexts[self._train])
        beforehand = replace(self._settings, norm_outlier=None, special_ids=self._special_ids)
        return int(beforehand.mask_of(torch.zeros(len(tokens)), tokens, positions).sum())

    @property
    def filter(self) -> TokenFilter:
        """The token filter, fitted on the first training contexts of the text when it is first needed."""
        return self._fitted()[self.hookpoint]

    def _fitted(self) -> dict[str, TokenFilter]:
        """The filter of each hookpoint."""
        if not self._filters:
            first = self._train[: -(-FIT_ROWS // self.context_tokens)]
            parts = [(*map(row_norms, _sides(rows)), rows.tokens, rows.positions) for rows in self._run(first, True)]
            *norms, tokens, positions = (torch.cat(column) for column in zip(*parts, strict=True))
            self._filters = {
                name: self._settings.fit(own, tokens, positions, self._special_ids)
                for name, own in zip(self._names, norms, strict=True)
            }
        return self._filters

    def _run(self, which: Int[Tensor, " n"], again: bool = False) -> Iterator[Batch]:
        """All rows of the contexts `which`, a few contexts at a time; `again` if they are asked for more than once."""
        for chosen in which.long().split(self.batch_contexts):
            rows = self._reader.rows(chosen, again)
            x = rows[self.hookpoint]
            tokens, positions, _ = labels_of(self.contexts[chosen]).to(x.device)
            target = None if self.target_hookpoint is None else rows[self.target_hookpoint]
            yield Batch(x, target, tokens=tokens.to(self.contexts.dtype), positions=positions)

    def _filtered_rows(self, which: Int[Tensor, " n"], again: bool = False) -> tuple[Batch, Seen]:
        """The rows of the contexts `which` that pass the filter, and what it left out."""
        seen = Seen()
        return joined([rows[self._mask(rows, seen)] for rows in self._run(which, again)]), seen

    def _mask(self, rows: Batch, seen: Seen) -> Bool[Tensor, " n"]:
        """True for the rows that pass the filter; the others are counted."""
        assert rows.tokens is not None and rows.positions is not None
        mask = torch.ones(len(rows), dtype=torch.bool, device=rows.x.device)
        for (name, own), side in zip(self._fitted().items(), _sides(rows), strict=True):
            counts = dict.fromkeys(REASONS, 0)
            mask &= own.counted(row_norms(side), rows.tokens, rows.positions, counts)
            seen.left_out.update({(name, reason): count for reason, count in counts.items()})
        seen.rows += len(rows)
        seen.kept += int(mask.sum())
        return mask

    def _blocks(self, epoch: int, first: int) -> Iterator[Batch]:
        """The blocks of an epoch from number `first` on, each shuffled."""
        order = self._train[permutation(len(self._train), self.seed, epoch).long()]

        def make(block: int, which: Tensor) -> tuple[Batch, Seen]:
            rows, seen = self._filtered_rows(which)
            return rows[permutation(len(rows), self.seed, epoch, "block", block).long().to(rows.x.device)], seen

        parts = list(enumerate(order.split(self.block_contexts)))[first:]
        for rows, seen in self._ahead(make, parts) if self.look_ahead else (make(*part) for part in parts):
            self._seen.add(seen)
            self._in_hand = seen
            yield rows

    def _ahead(
        self, make: Callable[[int, Tensor], tuple[Batch, Seen]], parts: list[tuple[int, Tensor]]
    ) -> Iterator[tuple[Batch, Seen]]:
        """Each block while the one before is handed out."""
        self._fitted()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="apportion-look-ahead")
        self._reader.stopped = False
        try:
            coming = None
            for part in [*parts, None]:
                now, coming = coming, None if part is None else pool.submit(make, *part)
                if now is not None:
                    yield now.result()
        finally:
            self._reader.stopped = True
            pool.shutdown()

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
                yield in_float(rows)
            if not delivered and block == row == 0:
                raise ValueError(
                    f"an epoch has fewer than batch_tokens={batch_tokens} rows left by the token filter: "
                    "use a smaller batch_tokens or more text"
                )
            epoch, block, row = epoch + 1, 0, 0

    def join(self) -> None:
        """Batches will be asked for in step with other sources of the same passes."""
        self._reader.join()

    def leave(self) -> None:
        """No more will be."""
        self._reader.leave()

    @property
    def bytes_held(self) -> int:
        """Of a block, in the dtype of the model."""
        size = next(self.model.parameters()).element_size()
        return min(self.block_contexts, len(self._train)) * self.context_tokens * sum(self._widths.values()) * size

    def passing(self) -> tuple[float, int]:
        """Seconds for each token of the model's passes over its contexts, and how many there are, as measured now on
        the first few."""
        captured = self._reader.captured
        self._reader.rows(self._train[: self.batch_contexts].long(), again=True)
        return captured.seconds / max(1, captured.passes * self.context_tokens), ids_of(self.contexts).numel()

    def sample(self, n: int) -> Batch:
        """Random rows of about as many random contexts as are needed for `n` rows."""
        return joined(list(self._draw(self._train, n, "sample")))

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        for rows in self._draw(self._held_out, max_rows, "held out"):
            yield from (rows[start : start + chunk] for start in range(0, len(rows), chunk))

    def unseen(self, max_rows: int) -> Batch | None:
        """Rows of contexts that are for neither training nor calibration, as many as one block has at most; None if
        there are none."""
        parts = list(self._draw(self._unseen[: self.block_contexts], max_rows, "unseen"))
        return joined(parts) if parts else None

    def _draw(self, contexts: Int[Tensor, " n"], max_rows: int, key: str) -> Iterator[Batch]:
        """Rows of random `contexts` in random order, a block of contexts at a time, until there are `max_rows`."""
        order = contexts[permutation(len(contexts), self.seed, key).long()]
        while max_rows > 0 and len(order):
            num_contexts = min(self.block_contexts, 1 + max_rows * 5 // (4 * self.context_tokens))
            rows, _ = self._filtered_rows(order[:num_contexts], again=True)
            rows = rows[permutation(len(rows), self.seed, key, "rows").long()[:max_rows].to(rows.x.device)]
            yield Batch(*(side.float() for side in _sides(rows)))
            order, max_rows = order[num_contexts:], max_rows - len(rows)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a position to mean the same rows."""
        target = {} if self.target_hookpoint is None else {"target_hookpoint": self.target_hookpoint}
        return {
            **target,
            "seed": self.seed,
            "num_contexts": len(self.contexts),
            "block_contexts": self.block_contexts,
            "batch_contexts": self.batch_contexts,
            "held_out_share": self.held_out_share,
        }

    def state_dict(self) -> dict[str, Any]:
        seen = {"seen": self._seen.without(self._in_hand)}  # that block will be made again
        return {**self._position._asdict(), **self._identity(), **self._medians(), **seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_source(state, self._identity())
        self._position = LivePosition(state["epoch"], state["block"], state["row"])
        self._set_filters(state)
        if "seen" in state:
            self._seen, self._in_hand = Seen.of_state(state["seen"]), Seen()

    def _medians(self) -> dict[str, float | None]:
        """The median norm of each hookpoint, None while the filter is not fitted."""
        found = [self._filters[name].median_norm if self._filters else None for name in self._names]
        return dict(zip(MEDIANS, found, strict=False))

    def _set_filters(self, state: dict[str, Any]) -> None:
        if state["median_norm"] is not None:
            self._filters = {
                name: replace(self._settings, median_norm=state[median], special_ids=self._special_ids)
                for name, median in zip(self._names, MEDIANS, strict=False)
            }

    def describe(self) -> About:
        sites = [self._site(name) for name in self._names]
        if self.target_hookpoint is None:
            own = {name: getattr(sites[0], name) for name in ("filter", "median_norm", "filtered")}
        else:
            own = {"sites": tuple(sites), "target_hookpoint": self.target_hookpoint}
        return About(
            kind=self.kind,
            hookpoint=self.hookpoint,
            d_in=self.d_in,
            dtype=dtype_of(self.model),
            **own,
            filtered_share=1 - self._seen.kept / max(1, self._seen.rows) if self._seen.rows else 0.0,
            rows_seen=self._seen.rows,
            rows_train=self.num_rows,
            rows_calibrate=num_rows(self.contexts[self._held_out]),
            held_out_share=self.held_out_share,
            seed=self.seed,
            language=Language(
                model=model_fingerprint(self.model),
                model_dtype=dtype_of(self.model),
                tokenizer=tokenizer_fingerprint(self.tokenizer),
                text=replace(self._text, contexts=len(self.contexts)),
                bos_prepended=begin_with_bos(self.tokenizer, ids_of(self.contexts)),
                context_tokens=self.context_tokens,
                layout=self.layout.to_json(),
            ),
        )

    def _site(self, name: str) -> Site:
        filtered = {reason: self._seen.left_out[name, reason] for reason in REASONS}
        own = self._fitted()[name]
        return Site(
            hookpoint=name,
            d_in=self._widths[name],
            filter=own.to_dict(),
            median_norm=own.median_norm,
            filtered=filtered,
            filtered_share=sum(filtered.values()) / max(1, self._seen.rows),
        )


def _one(model: Any, hookpoint: str) -> str:
    names = expand(model, hookpoint)
    if len(names) > 1:
        raise ValueError(f"hookpoint {hookpoint!r} stands for {len(names)} modules: a source has one, name it")
    return names[0]


def _sides(rows: Batch) -> list[Float[Tensor, "n _"]]:
    """x, and the target if there is one."""
    return [rows.x] if rows.target is None else [rows.x, rows.target]
