"""One decoding step of softmax attention over keys and values that lie at fixed addresses."""

from lolcats_kernels.softmax_decode.interface import softmax_decode_

__all__ = ["softmax_decode_"]
