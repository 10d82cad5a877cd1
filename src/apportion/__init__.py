"""Sparse autoencoders that spend their sparsity budget where it is needed.

import apportion as ap
sae = ap.create("mutual_choice", d_in=576, d_sae=4608, k=32)
latents = sae.encode(x)
x_hat = sae.decode(latents)
"""

from apportion.activations.batch import Batch as Batch
from apportion.architectures import SAES as SAES
from apportion.architectures import create as create
from apportion.architectures import load as load
from apportion.architectures.base import SAE as SAE
from apportion.intervene import ablate as ablate
from apportion.intervene import splice as splice
from apportion.intervene import steer as steer
from apportion.latents import Latents as Latents
from apportion.training import TrainConfig as TrainConfig
from apportion.training import Trainer as Trainer
