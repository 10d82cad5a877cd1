"""Interventions: put an SAE into a running model, or push along one of its latents.

    with splice(model, {"model.layers.8": sae}):                activations become what the SAE reconstructs
    with splice(model, {...: sae}, edit=fn, keep_error=True):   edited codes; what the SAE misses is added back
    with splice(model, {...: torch.zeros_like}):                any function of x instead of an SAE (zero ablation)
    with splice(model, {"model.layers.8.mlp": transcoder}):     what it predicts from the input it was trained on
    with steer(model, sae, latent=123, add=4.0):                4 activation units along decoder row 123
    with steer(model, sae, latent=123, clamp=2.0):              as if code 123 were 2; all else in x stays as it was
    with ablate(model, sae, latent=123):                        as if code 123 were 0

All of them are plain forward hooks for the length of a ``with`` block, removed again after an exception too. Rows that
a mask excludes (attention sinks, special tokens) pass through untouched and are not shown to the SAE, so that they
cannot take part in an allocation that couples tokens; nor is padding ever. `splice` applies the token filter that an
SAE was trained with. Which token is which follows from what the model is given in each pass (language/passes.py), so
that `generate` works, with and without a cache, and batches may be padded on either side.

A place that nothing in the model reads is refused, and so is a module that runs several times in a forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from apportion.about import About
from apportion.language.effect import check_read
from apportion.language.hook_names import reaches_all
from apportion.language.hookpoints import hooked, model_family, place_in
from apportion.language.passes import Watch, modules_of, watched
from apportion.rows.filter import TokenFilter, trained_filter

Mask = Bool[Tensor, "*lead"] | Callable[[Tensor], Tensor]
"""Which rows to change: a tensor in the leading shape of x, or a function of x that makes one."""
RowsOf = Callable[[Tensor], Tensor | None]
"""The rows of x that take part; None if all do."""


@runtime_checkable
class SparseCode(Protocol):
    """What `steer` reads of a code: see `apportion.latents.Latents`."""

    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " rows_plus_1"]
    shape: tuple[int, ...]


@runtime_checkable
class Codec(Protocol):
    """What counts as an SAE here. It is spared rows that its filter leaves out, if it says where its rows come from, as
    `source` or under `info["source"]`."""

    def encode(self, x: Float[Tensor, "*lead d_in"]) -> Any: ...

    def decode(self, latents: Any, x: Float[Tensor, "*lead d_in"]) -> Float[Tensor, "*lead d_in"]: ...


def _about(sae: Any) -> About:
    said = getattr(sae, "source", None)
    if isinstance(said, About):
        return said
    said = getattr(sae, "info", {}).get("source", {})  # of somebody else's: nothing but the filters has to be ours
    return About.from_json({key: said[key] for key in ("filter", "sites") if key in said})


@contextmanager
def splice(
    model: nn.Module,
    saes: Mapping[str, Codec | Callable[[Tensor], Tensor]],
    edit: Callable[[Any], Any] | None = None,
    keep_error: bool = False,
    mask: Mask | Literal["filter"] | None = "filter",
) -> Iterator[None]:
    """Within the block, replace the activations at each hookpoint by ``sae.decode(edit(sae.encode(x)), x)``.

    x are these activations or, for a transcoder, those at its own hookpoint in the same forward pass. `mask` says which
    rows: "filter" (default) those that pass the token filter the SAE was trained with, if it has one; None all; or a
    tensor or function. Padding is left out whatever the mask says. `keep_error` adds back what the unedited
    reconstruction misses, so that only the edit changes the model. Where a mask applies, `edit` sees the latents of the
    rows that take part, [rows, d_sae]; otherwise it sees them in the leading shape of x.

    ValueError for a place that does not fit the SAE, and for one that nothing in the model reads.
    """
    plain = [name for name, sae in saes.items() if not isinstance(sae, Codec)]
    if edit is not None and plain:
        raise ValueError(f"edit needs latents, but a plain function is spliced in at {plain[0]!r}: give an SAE there")

    with ExitStack() as stack:
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        sources: list[_Source] = []
        for given, sae in saes.items():
            name = place_to_change(model, given)
            _check_place(name, sae)
            places = [name, str(cast(Any, sae).hookpoint)] if getattr(sae, "needs_target", False) else [name]
            check_read(model, name)
            rows, *at_source = [stack.enter_context(rows_at(model, place, sae, mask)) for place in places]
            source = _Source(places[1], name, at_source[0]) if at_source else None
            sources += [source] if source else []
            change = partial(reconstruct, sae=sae, edit=edit, keep_error=keep_error)
            changes[name] = partial(_spliced, change=change, rows_of=rows, source=source)
        stack.enter_context(hooked(model, changes))
        for source in sources:  # behind the changes, so that it sees what they leave
            stack.enter_context(hooked(model, {source.hookpoint: source.look}))
        yield


def _spliced(
    y: Real[Tensor, "*lead d_out"], change: Callable[..., Tensor], rows_of: RowsOf, source: _Source | None
) -> Real[Tensor, "*lead d_out"]:
    """What takes the place of the activations y."""
    if source is None:
        return on_rows(y, rows_of(y), change)
    x = source.take()
    here, there = rows_of(y), source.rows_of(x)
    if x.shape[:-1] != y.shape[:-1] and x.shape[:-1].numel() == y.shape[:-1].numel():  # one of them flat
        there = None if there is None else there.reshape(y.shape[:-1])
        x = x.reshape(*y.shape[:-1], x.shape[-1])
    rows = here if there is None else there if here is None else here & there.to(here.device)
    return on_rows(y, rows, change, x)


class _Source:
    """What a transcoder reads, noted as it passes by."""

    def __init__(self, hookpoint: str, target: str, rows_of: RowsOf) -> None:
        self.hookpoint, self.target, self.rows_of = hookpoint, target, rows_of
        self._here = threading.local()

    def look(self, x: Tensor) -> None:
        self._here.x = x

    def take(self) -> Tensor:
        x = self._here.__dict__.pop("x", None)
        if x is None:
            raise ValueError(
                f"the model runs {self.target!r} before {self.hookpoint!r}, which the transcoder reads: "
                "splice it in at the hookpoint it was trained to predict"
            )
        return x


def place_to_change(model: nn.Module, name: str) -> str:
    """The canonical name of a hookpoint, for a change that is to reach all that reads what stands there.

    ValueError for another library's name of a sum that is kept past the module of its hookpoint.
    """
    place = place_in(model, name)
    if name in modules_of(model) or reaches_all(name, model_family(model)):
        return str(place)
    raise ValueError(
        f"what {name!r} means can be read at {str(place)!r} but not changed: only the MLP gets it from there. Choose "
        f"the output of the block, or give {str(place)!r} itself to change what the MLP reads"
    )


def _check_place(name: str, sae: Any) -> None:
    """Refuse a place where this SAE cannot be put."""
    if len(getattr(sae, "row_shape", (1,))) > 1:
        raise ValueError(
            f"{sae.name} needs all of its sites together, and {name!r} is one: splice works on SAEs of one hookpoint"
        )
    if not getattr(sae, "needs_target", False):
        return
    if sae.hookpoint is None:
        raise ValueError(f"the {sae.name} does not say what it reads: create it with hookpoint='model.layers.8.mlp:in'")
    target = sae.target_hookpoint
    if name != target and (target is not None or name == sae.hookpoint):
        raise ValueError(
            f"the {sae.name} reads {sae.hookpoint!r} and predicts {target or 'another place'!r}, not {name!r}: "
            "splice it in where it predicts"
        )


@contextmanager
def rows_at(
    model: nn.Module, hookpoint: str, sae: Any = None, mask: Mask | Literal["filter"] | None = None
) -> Iterator[RowsOf]:
    """A function of the activations at a hookpoint: which rows take part. Padding never does.

    `mask` as in `splice`; "filter" is the token filter that `sae` was trained with (at that hookpoint, if at several).
    """
    place = str(place_in(model, hookpoint))
    token_filter = trained_filter(_about(sae), place) if isinstance(mask, str) else None
    with watched(model, place) as watch:
        if token_filter is not None:
            yield partial(_filtered, token_filter=token_filter, watch=watch)
        else:
            yield partial(_attended, mask=None if isinstance(mask, str) else mask, watch=watch)


def _filtered(x: Tensor, token_filter: TokenFilter, watch: Watch) -> Bool[Tensor, "*lead"]:
    tokens = watch.at(x)
    if tokens is None:
        raise ValueError(
            "the model was run without token ids or embeddings, so that the token filter of the SAE cannot be applied: "
            "give mask=None, or a mask of your own"
        )
    rows = token_filter.mask(x, tokens.ids, tokens.positions)
    return rows if tokens.attended is None else rows & tokens.attended


def _attended(x: Tensor, mask: Mask | None, watch: Watch) -> Bool[Tensor, "*lead"] | None:
    rows = mask(x) if callable(mask) else mask
    if watch.tokens is None or watch.tokens.attended is None:
        return rows
    tokens = watch.at(x)
    assert tokens is not None and tokens.attended is not None
    if rows is None or rows.shape != tokens.attended.shape:  # of another shape: `on_rows` says so
        return tokens.attended if rows is None else rows
    return rows.to(x.device) & tokens.attended


def reconstruct(
    x: Real[Tensor, "*lead d_in"],
    source: Float[Tensor, "*lead d_source"] | None = None,
    *,
    sae: Codec | Callable[[Tensor], Tensor],
    edit: Callable[[Any], Any] | None,
    keep_error: bool,
) -> Real[Tensor, "*lead d_out"]:
    """What takes the place of x, if its width is that of x; `source` is what the SAE encodes, if not x."""
    if not isinstance(sae, Codec):
        return x if keep_error else sae(x)
    read = x if source is None else source
    latents = sae.encode(read)
    x_hat = sae.decode(latents, read)
    if edit is None:
        return x if keep_error else x_hat
    edited = sae.decode(edit(latents), read)
    return edited + (x - x_hat) if keep_error else edited


def on_rows(
    x: Real[Tensor, "*lead d_in"],
    rows: Bool[Tensor, "*lead"] | None,
    change: Callable[..., Tensor],
    *more: Float[Tensor, "*lead d"],
) -> Tensor:
    """`x` with `change` applied to the rows that take part (and to those of `more`), in the dtype of x."""
    if rows is None:
        new = change(x, *more).to(x.dtype)
        if new.shape != x.shape:
            raise ValueError(
                f"what is put back has shape {tuple(new.shape)}, the activations have {tuple(x.shape)}: "
                "use an SAE that was trained at this hookpoint and returns to it"
            )
        return new
    rows = rows.to(x.device)
    if rows.shape != x.shape[:-1]:
        raise ValueError(
            f"mask has shape {tuple(rows.shape)}, the activations have {tuple(x.shape)}: give one bool per token"
        )
    if not rows.any():
        return x
    return x.index_put((rows,), on_rows(x[rows], None, change, *(other[rows] for other in more)))


@contextmanager
def steer(
    model: nn.Module,
    sae: Any,
    *,
    latent: int,
    add: float | None = None,
    scale: float | None = None,
    clamp: float | None = None,
    hookpoint: str | None = None,
    mask: Mask | None = None,
) -> Iterator[None]:
    """Within the block, push the activations along one latent's decoder row. Exactly one of add, scale and clamp.

    add     activation units along the unit decoder row:        x + add * W_dec[j] / ||W_dec[j]||
    scale   multiply what the latent contributes:               x + (scale - 1) * z_j * W_dec[j] / s
    clamp   set its code, also where it was silent:             x + (clamp - z_j) * W_dec[j] / s

    z_j = sae.encode(x)[j] and s = sae.scale: codes live on scaled data, x in raw units. Everything else in x, the part
    the SAE does not reconstruct included, stays as it was. All tokens but padding are pushed, or those of `mask`.
    """
    if (add is not None) + (scale is not None) + (clamp is not None) != 1:
        raise ValueError(f"steer needs exactly one of add={add}, scale={scale} and clamp={clamp}")
    if getattr(sae, "needs_target", False):
        raise ValueError(
            f"steer needs an SAE that reconstructs what it reads, and a {sae.name} predicts something else: "
            "use splice with edit= and keep_error=True"
        )
    row, place = _decoder_row(sae, latent), hookpoint or getattr(sae, "hookpoint", None)
    if place is None:
        raise ValueError(
            "the SAE does not say where in the model it belongs: give hookpoint='model.layers.8' or the like"
        )
    per_token = getattr(getattr(sae, "config", None), "input_norm", "none") in ("token_standardise", "token_norm")
    if add is None and per_token:
        raise ValueError(
            "this SAE normalises every token by itself, so its codes have no fixed size in the model: "
            "steer with add= instead"
        )

    def push(x: Tensor) -> Tensor:
        direction = row.to(x.device, torch.float32)
        if add is not None:
            return x + (add * direction / direction.norm()).to(x.dtype)
        code = latent_column(sae.encode(x), latent).float()
        change = code * (scale - 1) if scale is not None else cast(float, clamp) - code
        return x + (change[..., None] * direction / sae.scale).to(x.dtype)

    place = place_to_change(model, place)
    check_read(model, place)
    with rows_at(model, place, mask=mask) as rows_of, hooked(model, {place: lambda x: on_rows(x, rows_of(x), push)}):
        yield


def ablate(model: nn.Module, sae: Any, *, latent: int, hookpoint: str | None = None, mask: Mask | None = None) -> Any:
    """Within the block, remove what one latent contributes: `steer` with scale=0."""
    return steer(model, sae, latent=latent, scale=0.0, hookpoint=hookpoint, mask=mask)


def _decoder_row(sae: Any, latent: int) -> Float[Tensor, " d_in"]:
    """The row of W_dec that belongs to `latent`, as it is now."""
    W_dec = sae.W_dec
    if W_dec.ndim != 2:
        raise ValueError(f"W_dec has shape {tuple(W_dec.shape)}: steer works on SAEs with one hookpoint")
    if not 0 <= latent < W_dec.shape[0]:
        raise ValueError(f"latent={latent} does not exist: this SAE has latents 0 to {W_dec.shape[0] - 1}")
    return W_dec[latent]


def latent_column(latents: SparseCode | Tensor, latent: int) -> Float[Tensor, "*lead"]:
    """The code of one latent on every token, without a dense matrix."""
    if isinstance(latents, Tensor):
        return latents[..., latent]
    hits = (latents.indices == latent).nonzero().squeeze(1)
    rows = torch.searchsorted(latents.offsets, hits, right=True) - 1
    column = latents.values.new_zeros(latents.offsets.numel() - 1)
    return column.index_put((rows,), latents.values[hits]).reshape(latents.shape)
