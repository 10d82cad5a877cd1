"""What training may minimise instead of each SAE's own reconstruction loss. One file, one objective."""

from apportion.objectives.end_to_end import EndToEnd as EndToEnd
from apportion.objectives.end_to_end import EndToEndConfig as EndToEndConfig
from apportion.objectives.mutual import MutualConfig as MutualConfig
from apportion.objectives.mutual import MutualFeatureRegularisation as MutualFeatureRegularisation
