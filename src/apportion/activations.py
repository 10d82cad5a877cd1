"""What `apportion.activations` used to hold, under its names of then: now the rooms rows, language and synthetic."""

import sys
from importlib import import_module

from apportion.language import ContextSource as ContextSource
from apportion.language import LiveSource as LiveSource
from apportion.language import TextSource as TextSource
from apportion.language import load_model as load_model
from apportion.language import read_contexts as read_contexts
from apportion.rows import ActivationStore as ActivationStore
from apportion.rows import ArraySource as ArraySource
from apportion.rows import Batch as Batch
from apportion.rows import CacheSource as CacheSource
from apportion.rows import LayersStore as LayersStore
from apportion.rows import PairStore as PairStore
from apportion.rows import SitesStore as SitesStore
from apportion.rows import Source as Source
from apportion.rows import TokenFilter as TokenFilter
from apportion.rows import open_stores as open_stores
from apportion.synthetic import LIKE_SYNTH_SAE_BENCH as LIKE_SYNTH_SAE_BENCH
from apportion.synthetic import GroundTruthConfig as GroundTruthConfig
from apportion.synthetic import GroundTruthSource as GroundTruthSource

MOVED = {
    "rows": "arrays batch filter manifest order sites source store stream writer",
    "language": "collect contexts documents fingerprint hookpoints live model passes text text_files tokens upper",
    "synthetic": "ground_truth world",
}
for _room, _files in MOVED.items():
    for _file in _files.split():
        sys.modules[f"{__name__}.{_file}"] = import_module(f"apportion.{_room}.{_file}")
