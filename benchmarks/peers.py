"""The peers: each runs its own training loop, with its recommended settings, on batches from the gate.

What is ours here is only what a user would write: a config, and where the activations come from. Settings are those of
each library's README or training tutorial, else its defaults. `total` is the length of the run that its schedules are
made for. Every function ends in the library's own loop, which runs until the parent stops it.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gate import Gate, Skip

LONG_RUN_STEPS = 30_000
SCALE_BATCHES = 100
"""From how many batches a scale of the input is estimated (SAELens would take 1000; this is off the clock)."""


def run(gate: Gate) -> None:
    globals()[gate.task.subject.library](gate)


def total_steps(gate: Gate) -> int:
    return gate.task.total_steps or LONG_RUN_STEPS


def has_aux(gate: Gate) -> bool:
    """True if silent latents are to be simulated for an auxiliary loss."""
    return gate.task.subject.aux == "aux_k"


def sae_lens(gate: Gate) -> None:
    """SAETrainer.fit: Adam 3e-4, gradients clipped to 1, inputs scaled; autocast is its own option.

    Its k_aux is d_in / 2 and cannot be set.
    """
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape, prefix = gate.task.shape, {"topk": "TopK", "batch_topk": "BatchTopK"}[gate.task.subject.method]
    config = getattr(sae_lens, f"{prefix}TrainingSAEConfig")(
        d_in=shape.d_in,
        d_sae=shape.d_sae,
        k=shape.k,
        device=str(gate.device),
        normalize_activations="expected_average_only_in",
    )
    gate.begin()
    sae = getattr(sae_lens, f"{prefix}TrainingSAE")(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=total_steps(gate) * shape.batch + 1,
            train_batch_size_samples=shape.batch,
            lr=3e-4,
            lr_end=3e-5,  # its runner's default; only cosine schedules use it
            device=str(gate.device),
            autocast=gate.task.subject.precision == "bfloat16",
            n_batches_for_norm_estimate=SCALE_BATCHES,
        ),
        sae,
        gate,
    )
    silent = gate.silent()
    if has_aux(gate):
        window = trainer.cfg.dead_feature_window
        gate.before_step = lambda: trainer.n_forward_passes_since_fired.index_fill_(0, silent, window + 1)
    scaler = trainer.activation_scaler
    gate.reconstruct = lambda x: scaler.unscale(sae(scaler.scale(x)))
    gate.describe(sae, version=version("sae-lens"), lr=3e-4, optimiser="Adam")
    gate.prepare(SCALE_BATCHES)
    trainer.fit()


def dictionary_learning(gate: Gate) -> None:
    """trainSAE: Adam, 1000 steps of warm-up, gradients projected and clipped to 1, inputs scaled to unit norm."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    if gate.task.subject.precision == "bfloat16" and gate.device.type == "cpu":
        raise Skip("its trainSAE has no autocast on a CPU")
    shape, total = gate.task.shape, total_steps(gate)
    trainer_class = {"topk": TopKTrainer, "batch_topk": BatchTopKTrainer}[gate.task.subject.method]
    silent = gate.silent()

    def make(**settings: Any) -> Any:
        """trainSAE keeps its trainers to itself: look at this one while it is made."""
        gate.begin()
        trainer = trainer_class(**settings)
        if has_aux(gate):
            trainer.top_k_aux = gate.task.k_aux
            threshold = trainer.dead_feature_threshold
            gate.before_step = lambda: trainer.num_tokens_since_fired.index_fill_(0, silent, threshold)
        gate.reconstruct = lambda x: reconstruct(trainer.ae, x)
        gate.describe(trainer.ae, version=version("dictionary-learning"), lr=trainer.lr, optimiser="Adam")
        return trainer

    def reconstruct(ae: nn.Module, x: Tensor) -> Tensor:
        return ae.decode(ae.encode(x / scale, use_threshold=False)) * scale

    scale = gate.rows.square().sum(1).mean().sqrt().item()
    gate.prepare(SCALE_BATCHES + 2)  # its estimate looks at two more than it says
    trainSAE(
        gate,
        [
            {
                "trainer": make,
                "activation_dim": shape.d_in,
                "dict_size": shape.d_sae,
                "k": shape.k,
                "layer": 0,
                "lm_name": "none",
                "steps": total,
                "warmup_steps": min(1000, total // 10),
                "decay_start": int(0.8 * total),
                "seed": gate.task.seed,
                "device": str(gate.device),
            }
        ],
        steps=total + 1,
        normalize_activations=True,
        device=str(gate.device),
        autocast_dtype=getattr(torch, gate.task.subject.precision),
    )


def sparsify(gate: Gate) -> None:
    """Trainer.fit on a "language model" whose only module returns the batch: schedule-free signum, its default.

    Its forward runs in bf16 autocast wherever a GPU supports it, and never on a CPU; the CPU's bf16 class puts the same
    autocast around the same function.
    """
    if gate.device.type == "cpu":  # where Triton is installed, sparsify takes it, which needs a GPU
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    shape = gate.task.shape
    bf16 = gate.task.subject.precision == "bfloat16"
    if not bf16 and gate.device.type == "cuda":
        raise Skip("it always uses bf16 autocast on a GPU")
    config = TrainConfig(
        SparseCoderConfig(num_latents=shape.d_sae, k=shape.k),
        batch_size=1,
        hookpoints=["acts"],
        auxk_alpha=1 / 32 if has_aux(gate) else 0.0,
        save_every=10**9,
        log_to_wandb=False,
        init_seeds=[gate.task.seed],
    )
    gate.begin()
    model = _Replay(gate)
    trainer = Trainer(config, _Sequences(gate, model, total_steps(gate)), model)
    (sae,) = trainer.saes.values()
    if bf16 and gate.device.type == "cpu":
        sae.forward = torch.autocast("cpu", dtype=torch.bfloat16)(sae.forward)
    (since_fired,) = trainer.num_tokens_since_fired.values()
    silent = gate.silent()
    if has_aux(gate):
        gate.before_step = lambda: since_fired.index_fill_(0, silent, config.dead_feature_threshold + 1)
    (optimizer,) = trainer.optimizers

    def reconstruct(x: Tensor) -> Tensor:
        optimizer.eval()
        try:
            return sae(x).sae_out
        finally:
            optimizer.train()

    gate.reconstruct = reconstruct
    gate.describe(sae, version=version("eai-sparsify"), lr=optimizer.param_groups[0]["lr"], optimiser="signum")
    trainer.fit()


class _Replay(nn.Module):
    """What sparsify needs of a language model; the module `acts` returns the batch as one sequence."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.acts = nn.Identity()
        self.rows = gate.held_out[:1]
        self.device = gate.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.acts(self.rows[None])


class _Sequences:
    """A dataset of sequences as long as the batch; asking for one asks the gate."""

    def __init__(self, gate: Gate, model: _Replay, length: int) -> None:
        self.gate, self.model, self.length = gate, model, length
        self.token_ids = torch.zeros(gate.task.shape.batch, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.model.rows = next(self.gate)
        return {"input_ids": self.token_ids}


def overcomplete(gate: Gate) -> None:
    """train_sae: Adam 5e-4 and plain squared error, as in its README; gradients clipped to 1; bf16: train_sae_amp.

    Its k is that of a whole batch in BatchTopK. Its auxiliary loss takes half of all codes that were not chosen, silent
    or not.
    """
    _make_overcomplete_importable()
    from overcomplete.sae import BatchTopKSAE, TopKSAE, train_sae
    from overcomplete.sae.losses import top_k_auxiliary_loss
    from overcomplete.sae.train import train_sae_amp

    def squared_error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    shape = gate.task.shape
    gate.begin()
    if gate.task.subject.method == "topk":
        sae = TopKSAE(shape.d_in, shape.d_sae, top_k=shape.k, device=str(gate.device))
    else:
        sae = BatchTopKSAE(shape.d_in, shape.d_sae, top_k=shape.k * shape.batch, device=str(gate.device))
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-4)
    gate.reconstruct = lambda x: sae(x)[2]
    gate.describe(sae, version=version("overcomplete"), lr=5e-4, optimiser="Adam")
    loop = train_sae_amp if gate.task.subject.precision == "bfloat16" else train_sae
    criterion = top_k_auxiliary_loss if has_aux(gate) else squared_error
    loop(sae, gate, criterion, optimizer, nb_epochs=1, device=gate.device.type)


def _make_overcomplete_importable() -> None:
    """It also imports image models and colour maps, not used here, which need torchvision and matplotlib < 3.9."""
    import matplotlib
    import matplotlib.cm

    if not hasattr(matplotlib.cm, "get_cmap"):
        matplotlib.cm.get_cmap = matplotlib.colormaps.__getitem__
    try:
        import torchvision.transforms  # noqa: F401
    except (ImportError, RuntimeError):
        vision, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
        vision.transforms = transforms
        sys.modules |= {"torchvision": vision, "torchvision.transforms": transforms}
