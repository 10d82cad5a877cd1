"""From a language model to rows of activations: text, tokens, hooks, the cache on disk, and shuffled batches.

text.py ──> tokens.py ──> collect.py (hookpoints.py, filter.py) ──> store.py ──> source.py ──> Batch
documents   contexts      forward passes up to the hookpoint        cache        CacheSource
            └───────────> live.py: LiveSource, the same batches without a cache ────────────┤
                          contexts.py: ContextSource, whole contexts, and upper.py above ───┘

text.py stands on documents.py (what a row holds), text_files.py (kinds of files) and text_streams.py (what fails for a
moment). sites.py joins several hookpoints of a cache: pairs for transcoders, sites for crosscoders, layers for MLSAE.
"""

from apportion.activations.batch import ArraySource as ArraySource
from apportion.activations.batch import Batch as Batch
from apportion.activations.batch import Source as Source
from apportion.activations.contexts import ContextSource as ContextSource
from apportion.activations.filter import TokenFilter as TokenFilter
from apportion.activations.ground_truth import GroundTruthSource as GroundTruthSource
from apportion.activations.live import LiveSource as LiveSource
from apportion.activations.model import load_model as load_model
from apportion.activations.sites import LayersStore as LayersStore
from apportion.activations.sites import PairStore as PairStore
from apportion.activations.sites import SitesStore as SitesStore
from apportion.activations.sites import open_stores as open_stores
from apportion.activations.source import CacheSource as CacheSource
from apportion.activations.store import ActivationStore as ActivationStore
from apportion.activations.text import TextSource as TextSource
from apportion.activations.tokens import read_contexts as read_contexts
from apportion.activations.world import LIKE_SYNTH_SAE_BENCH as LIKE_SYNTH_SAE_BENCH
from apportion.activations.world import GroundTruthConfig as GroundTruthConfig
