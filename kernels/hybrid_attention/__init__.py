"""The hybrid attention operator: a softmax window plus learnable linear attention over everything older."""

from lolcats_kernels.hybrid_attention.bidirectional import (
    TokenGrid,
    attend_bidirectional,
    bidirectional_error,
    bidirectional_weights,
)
from lolcats_kernels.hybrid_attention.config import HybridConfig, HybridWeights
from lolcats_kernels.hybrid_attention.feature_maps import apply_feature_map, feature_count
from lolcats_kernels.hybrid_attention.functional import (
    attention_transfer_loss,
    bidirectional_attention,
    hybrid_attention,
    hybrid_attention_naive,
    hybrid_decode_,
)
from lolcats_kernels.hybrid_attention.interface import attend, decode_, transfer_error
from lolcats_kernels.hybrid_attention.naive import attention_weights, window_mask, window_scores
from lolcats_kernels.hybrid_attention.state import HybridState, empty_state

__all__ = [
    "HybridConfig",
    "HybridState",
    "HybridWeights",
    "TokenGrid",
    "apply_feature_map",
    "attend",
    "attend_bidirectional",
    "attention_transfer_loss",
    "attention_weights",
    "bidirectional_attention",
    "bidirectional_error",
    "bidirectional_weights",
    "decode_",
    "empty_state",
    "feature_count",
    "hybrid_attention",
    "hybrid_attention_naive",
    "hybrid_decode_",
    "transfer_error",
    "window_mask",
    "window_scores",
]
