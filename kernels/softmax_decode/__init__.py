"""A decoding step of softmax attention over keys and values that lie at fixed addresses."""

from lolcats_kernels.softmax_decode.interface import softmax_decode_
from lolcats_kernels.softmax_decode.step import DecodeStep

__all__ = ["DecodeStep", "softmax_decode_"]
