"""Rows whose features are known: a made-up world (world.py), and a source of rows from it (ground_truth.py)."""

from apportion.synthetic.ground_truth import GroundTruthSource as GroundTruthSource
from apportion.synthetic.world import LIKE_SYNTH_SAE_BENCH as LIKE_SYNTH_SAE_BENCH
from apportion.synthetic.world import GroundTruthConfig as GroundTruthConfig
