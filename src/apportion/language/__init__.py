"""From text through a language model to rows, and back into the model.

text.py ──> tokens.py ──> collect.py ──> a cache (rows/store.py)
documents   contexts      forward passes up to the hookpoints (hookpoints.py, passes.py)
            └───────────> live.py: LiveSource, training batches without a cache
                          contexts.py: ContextSource, whole contexts, and upper.py: the layers above them
                          intervene.py: splice, steer, ablate

text.py (of several, mixture.py) stands on documents.py (what a row holds), text_files.py (kinds of files),
chats.py (conversations) and text_streams.py (what fails for a moment).
"""

from apportion.language.contexts import ContextSource as ContextSource
from apportion.language.live import LiveSource as LiveSource
from apportion.language.mixture import Mixture as Mixture
from apportion.language.model import load_model as load_model
from apportion.language.text import TextSource as TextSource
from apportion.language.tokens import read_contexts as read_contexts
