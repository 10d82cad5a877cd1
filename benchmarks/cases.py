"""What is measured: a case is a shape and the subjects that run on it in turns.

A subject is one training loop (or one encoder, or the bare product that everything is measured in). The table below is
all there is to edit to measure something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

OURS = ("mutual_choice", "topk", "feature_choice")
PEERS: dict[str, tuple[str, ...]] = {
    "sae_lens": ("topk", "batch_topk"),
    "dictionary_learning": ("topk", "batch_topk"),
    "sparsify": ("topk",),
    "overcomplete": ("topk", "batch_topk"),
}
NAMES = {
    "sae_lens": "SAELens",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "mutual_choice": "Mutual Choice",
    "feature_choice": "Feature Choice",
    "switch_width": "Switch, width-matched",
    "switch_flop": "Switch, FLOP-matched",
    "product": "x W^T",
    "bfloat16": "bf16",
    "auto": "screen=auto",
}
SWITCH = {"switch_width": (16, 1), "switch_flop": (8, 8)}
"""Switch SAEs: how many experts, and how many times d_sae latents they have together."""


@dataclass(frozen=True)
class Shape:
    d_in: int = 768
    d_sae: int = 16384
    k: int = 32
    batch: int = 4096


@dataclass(frozen=True)
class Subject:
    library: str
    """torch (the bare product), apportion, or a peer."""
    method: str
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """float32: ours without a screen. bfloat16: our screen; the autocast that a peer offers. auto: our default."""
    aux: Literal["none", "aux_k", "aux_zipf", "default"] = "none"
    """Auxiliary loss with silent latents simulated, or the library's own default with none silent."""
    mode: Literal["train", "encode"] = "train"

    @property
    def name(self) -> str:
        """The key in the JSON file, e.g. apportion/topk/aux_k/bfloat16."""
        special = ((self.aux, ("none", "default")), (self.precision, ("float32",)), (self.mode, ("train",)))
        return "/".join([self.library, self.method, *(word for word, usual in special if word not in usual)])

    @property
    def label(self) -> str:
        """For tables and plots, e.g. "SAELens BatchTopK bf16"."""
        words = self.name.split("/")
        return " ".join(NAMES.get(word, word) for word in words if word != "torch")


UNIT = Subject("torch", "product")
"""What everything is measured in: the encoder's product in float32, in the blocks in which torch is fastest here."""


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape
    subjects: tuple[Subject, ...]
    """Besides the unit, which is always there."""
    steps: int
    warmup: int
    total_steps: int | None = None
    """Length of the run that schedules are made for; None: as at the start of a long one."""


@dataclass(frozen=True)
class Plan:
    """What the cases are made from."""

    shape: Shape
    peers: tuple[str, ...] = tuple(PEERS)
    steps: int = 11
    warmup: int = 3
    learning_steps: int = 1000
    d_saes: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    batches: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    ks: tuple[int, ...] = (8, 16, 32, 64, 128, 256)

    def case(self, name: str, subjects: tuple[Subject, ...], **changes: int) -> Case:
        return Case(name, replace(self.shape, **changes), subjects, self.steps, self.warmup)

    def peer_subjects(self, base: Subject) -> tuple[Subject, ...]:
        """All methods of all peers, otherwise like `base`."""
        pairs = ((library, method) for library in self.peers for method in PEERS[library])
        return tuple(replace(base, library=library, method=method) for library, method in pairs)


def our_subjects(base: Subject) -> tuple[Subject, ...]:
    return tuple(replace(base, library="apportion", method=method) for method in OURS)


def counterparts(subject: Subject) -> tuple[Subject, ...]:
    """What a subject is compared with besides the unit: ours of the same kind, Mutual Choice, no auxiliary loss."""
    if subject.library in PEERS:
        method = {"topk": "topk", "batch_topk": "mutual_choice"}[subject.method]
        ours = replace(subject, library="apportion", method=method)
        return (ours, replace(ours, precision="auto")) if subject.precision == "float32" else (ours,)
    if subject.library == "torch":
        return ()
    if subject.method in SWITCH:
        return (replace(subject, method="topk"),)
    mutual_choice, without_aux = replace(subject, method="mutual_choice"), replace(subject, aux="none")
    without_screen = replace(subject, precision="float32")
    return tuple(s for s in (mutual_choice, without_aux, without_screen) if s != subject)


def main(plan: Plan) -> list[Case]:
    """float32, no auxiliary loss: ours without a screen and with the default one, and the peers."""
    ours = (*our_subjects(UNIT), *our_subjects(replace(UNIT, precision="auto")))
    return [plan.case("main", (*ours, *plan.peer_subjects(UNIT)))]


def bf16(plan: Plan) -> list[Case]:
    """Our bf16 screen and the peers' autocast."""
    base = replace(UNIT, precision="bfloat16")
    return [plan.case("bf16", (base, *our_subjects(base), *plan.peer_subjects(base)))]


def aux(plan: Plan) -> list[Case]:
    """With auxiliary loss, a tenth of the latents declared silent; ours also without, for the ratio."""
    base = replace(UNIT, aux="aux_k")
    one = Subject("apportion", "mutual_choice")
    screened = (replace(one, precision=p, aux=a) for p in ("bfloat16", "auto") for a in ("none", "aux_k", "aux_zipf"))
    others = (replace(one, aux="aux_zipf"), *screened)
    return [plan.case("aux", (*our_subjects(UNIT), *our_subjects(base), *others, *plan.peer_subjects(base)))]


def encode(plan: Plan) -> list[Case]:
    """Eval mode: raw activations to latents, with calibrated thresholds."""
    base = replace(UNIT, mode="encode")
    return [plan.case("encode", our_subjects(base) + our_subjects(replace(base, precision="bfloat16")))]


def switch(plan: Plan) -> list[Case]:
    """Switch SAEs against TopK: of equal width, and with experts as wide as the TopK SAE."""
    one = Subject("apportion", "topk")
    return [plan.case("switch", (one, *(replace(one, method=method) for method in SWITCH)))]


def d_sae(plan: Plan) -> list[Case]:
    return [plan.case("d_sae", our_subjects(UNIT), d_sae=n) for n in plan.d_saes]


def batch(plan: Plan) -> list[Case]:
    return [plan.case("batch", our_subjects(UNIT), batch=n) for n in plan.batches]


def k(plan: Plan) -> list[Case]:
    return [plan.case("k", our_subjects(UNIT), k=n) for n in plan.ks]


def learning(plan: Plan) -> list[Case]:
    """More steps on a smaller SAE, with every library's defaults and schedules: is anybody fast by not learning?"""
    base = replace(UNIT, aux="default")
    subjects = our_subjects(base) + plan.peer_subjects(base)
    shape = replace(plan.shape, d_sae=min(plan.shape.d_sae, 4096), batch=min(plan.shape.batch, 1024))
    return [Case("learning", shape, subjects, plan.learning_steps, 0, plan.learning_steps)]


CASES: dict[str, Callable[[Plan], list[Case]]] = {
    f.__name__: f for f in (main, bf16, aux, encode, switch, d_sae, batch, k, learning)
}


@dataclass(frozen=True)
class Task:
    """What a worker is told; plain values only, for it may be another Python."""

    subject: Subject
    shape: Shape
    rows_file: str
    total_steps: int | None
    threads: int | None
    device: str
    seed: int
    silent_share: float = 0.1
    k_aux: int = 256
