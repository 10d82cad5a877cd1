"""From a language model to rows of activations: text, tokens, hooks, the cache on disk, and shuffled batches.

text.py ──> tokens.py ──> collect.py (hookpoints.py, filter.py) ──> store.py ──> source.py ──> Batch
documents   contexts      forward passes up to the hookpoint        cache        CacheSource
            └───────────> live.py: LiveSource, the same batches without a cache ────────────┘
"""

from apportion.activations.batch import ArraySource as ArraySource
from apportion.activations.batch import Batch as Batch
from apportion.activations.batch import Source as Source
from apportion.activations.collect import load_model as load_model
from apportion.activations.filter import TokenFilter as TokenFilter
from apportion.activations.live import LiveSource as LiveSource
from apportion.activations.source import CacheSource as CacheSource
from apportion.activations.store import ActivationStore as ActivationStore
from apportion.activations.text import TextSource as TextSource
from apportion.activations.tokens import read_contexts as read_contexts
