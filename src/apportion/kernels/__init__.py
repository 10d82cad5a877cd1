"""The fast code: which matches are chosen, their codes, the decoder and the gradients."""

from apportion.kernels.select import Matches, Screen, choose
from apportion.kernels.sparse import decode_matches, encode_matches

__all__ = ["Screen", "Matches", "choose", "decode_matches", "encode_matches"]
