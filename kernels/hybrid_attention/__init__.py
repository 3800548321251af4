"""The hybrid attention operator: a softmax window plus learnable linear attention over everything older."""

from lolcats_kernels.hybrid_attention.feature_maps import apply_feature_map, feature_count
from lolcats_kernels.hybrid_attention.interface import attention_transfer_loss, hybrid_attention, hybrid_decode_
from lolcats_kernels.hybrid_attention.naive import hybrid_attention_naive, hybrid_weights, window_mask, window_scores
from lolcats_kernels.hybrid_attention.state import HybridState, empty_state

__all__ = [
    "HybridState",
    "apply_feature_map",
    "attention_transfer_loss",
    "empty_state",
    "feature_count",
    "hybrid_attention",
    "hybrid_attention_naive",
    "hybrid_decode_",
    "hybrid_weights",
    "window_mask",
    "window_scores",
]
