"""What sparse autoencoders compute: one file, one architecture; table.py gives pairs with rules the names of papers."""

from apportion.architectures.base import SAE as SAE
from apportion.architectures.base import SAEConfig as SAEConfig
from apportion.architectures.convert import to_jumprelu as to_jumprelu
from apportion.architectures.loading import load as load
from apportion.architectures.table import SAES as SAES
from apportion.architectures.table import NamedSAE as NamedSAE
from apportion.architectures.table import create as create
from apportion.architectures.table import named as named
from apportion.architectures.table import rebuild as rebuild
from apportion.architectures.table import rule_choices as rule_choices
from apportion.architectures.table import rule_name as rule_name
