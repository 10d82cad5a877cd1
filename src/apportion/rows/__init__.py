"""Rows of numbers, whatever they come from: batches and sources to train on, stores to evaluate on.

batch.py    Batch, Source, ArraySource            what the trainer consumes, and a tensor in memory
stream.py   StreamSource                          whatever yields rows
store.py    ActivationStore                       a cache on disk; writer.py, manifest.py and shards.py are its files
sites.py    PairStore, SitesStore, LayersStore    several hookpoints of a cache together
source.py   CacheSource                           shuffled training rows of a store
arrays.py   ArrayStore                            rows of an array, to evaluate on
filter.py   TokenFilter                           which rows take part; order.py: in which order

Nothing here knows a language model.
"""

from apportion.rows.arrays import ArrayStore as ArrayStore
from apportion.rows.batch import ArraySource as ArraySource
from apportion.rows.batch import Batch as Batch
from apportion.rows.batch import RowStore as RowStore
from apportion.rows.batch import Source as Source
from apportion.rows.filter import TokenFilter as TokenFilter
from apportion.rows.sites import LayersStore as LayersStore
from apportion.rows.sites import PairStore as PairStore
from apportion.rows.sites import SitesStore as SitesStore
from apportion.rows.sites import open_stores as open_stores
from apportion.rows.source import CacheSource as CacheSource
from apportion.rows.store import ActivationStore as ActivationStore
