"""Triton kernels of the hybrid attention: chunk-parallel forward, full backward, attention transfer, decoding."""
