"""The fast code: which matches are chosen, their codes, the decoder and the gradients."""

from apportion.kernels.product import Experts
from apportion.kernels.select import Matches, choose
from apportion.kernels.sparse import decode_matches, encode_matches, rows_of

__all__ = ["Experts", "Matches", "choose", "decode_matches", "encode_matches", "rows_of"]
