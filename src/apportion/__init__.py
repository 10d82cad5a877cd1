"""Sparse autoencoders that spend their sparsity budget where it is needed.

import apportion as ap
sae = ap.create("mutual_choice", d_in=576, d_sae=4608, k=32)
latents = sae.encode(x)
x_hat = sae.decode(latents)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apportion import testing as testing
    from apportion.architectures import SAES as SAES
    from apportion.architectures import create as create
    from apportion.architectures import to_jumprelu as to_jumprelu
    from apportion.architectures.base import SAE as SAE
    from apportion.evals.evaluate import evaluate as evaluate
    from apportion.interop.adapters import to_sae_bench as to_sae_bench
    from apportion.interop.adapters import to_sae_lens as to_sae_lens
    from apportion.interop.delphi import write_delphi_cache as write_delphi_cache
    from apportion.interop.export import export as export
    from apportion.interop.load import load as load
    from apportion.interop.publish import push_to_hub as push_to_hub
    from apportion.language.intervene import ablate as ablate
    from apportion.language.intervene import splice as splice
    from apportion.language.intervene import steer as steer
    from apportion.latents import Latents as Latents
    from apportion.rows.batch import Batch as Batch
    from apportion.training import TrainConfig as TrainConfig
    from apportion.training import Trainer as Trainer
    from apportion.training.together import fit_together as fit_together
    from apportion.viewing.examples import examples_of as examples_of

LATER = {
    **dict.fromkeys(("SAES", "create", "to_jumprelu", "SAE"), "apportion.architectures"),
    "Latents": "apportion.latents",
    "Batch": "apportion.rows.batch",
    **dict.fromkeys(("TrainConfig", "Trainer"), "apportion.training"),
    "fit_together": "apportion.training.together",
    "evaluate": "apportion.evals.evaluate",
    "examples_of": "apportion.viewing.examples",
    "testing": "apportion.testing",
    "load": "apportion.interop.load",
    "export": "apportion.interop.export",
    "push_to_hub": "apportion.interop.publish",
    **dict.fromkeys(("to_sae_bench", "to_sae_lens"), "apportion.interop.adapters"),
    "write_delphi_cache": "apportion.interop.delphi",
    **dict.fromkeys(("ablate", "splice", "steer"), "apportion.language.intervene"),
}
"""Where the public names are. They are imported when they are first used: torch takes seconds."""


def __dir__() -> list[str]:
    """The public names, and no others."""
    return sorted(LATER)


def __getattr__(name: str) -> Any:
    if name in LATER:
        module = import_module(LATER[name])
        return getattr(module, name, module)
    if not name.startswith("_") and find_spec(f"apportion.{name}"):  # a room: ap.rows, ap.training
        return import_module(f"apportion.{name}")
    raise AttributeError(f"module 'apportion' has no attribute {name!r}")
