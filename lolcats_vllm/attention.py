"""The attention of a linearized layer, in the place of vLLM's own.

vLLM's classes project, normalise and rotate, and call `attn(q, k, v)`; so one module serves every family. Groups with a
state of constant size are computed here, from and to pages that vLLM takes for those of a Mamba layer; groups that keep
softmax attention to all tokens are attention layers of vLLM's inside this one.

# T tokens of a step, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.feature_maps import FeatureMaps, Scores
from lolcats_core.model.rotary import Rotary
from lolcats_vllm.state import LayerPlan, StateLayout, head_dim, heads_at_once, page_shapes, part_operands
from lolcats_vllm.steps import Batch, run_step


class LinearizedAttention(nn.Module, MambaBase):
    """Attention of one layer of which at least one kv group has a state of constant size.

    Args:
        softmax: vLLM's attention of the softmax layer, whose place and name this one takes.
        config: of the linearized model. `layer`: number of the layer.
        rotary: how q and k were rotated, where features read them before that.
    """

    def __init__(self, softmax: Attention, config: Any, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        self.plan, self.linearized_config, self.dtype = (
            LayerPlan.of(config, layer),
            config,
            vllm_config.model_config.dtype,
        )
        self.scores = Scores(softmax.impl.scale, getattr(config, "attn_logit_softcapping", None))
        self.layout = StateLayout(config, self.plan.parts, self.dtype)
        self.queries = config.num_attention_heads // self.plan.groups.count
        settings = LinearizeConfig.from_dict(config.linearize)
        self.feature_maps: FeatureMaps | None = None
        if self.plan.groups.linear:
            self.feature_maps = FeatureMaps(settings, self.plan.groups, self.queries, head_dim(config))
            self.feature_maps.rotary = rotary
            self.feature_maps.requires_grad_(False)
        self.layer_name = softmax.layer_name
        context = vllm_config.compilation_config.static_forward_context
        context[self.layer_name] = self
        at_once = heads_at_once(config)
        self.kept = nn.ModuleList(
            Attention(
                at_once * self.queries,
                softmax.head_size,
                softmax.impl.scale,
                num_kv_heads=at_once,
                cache_config=vllm_config.cache_config,
                logits_soft_cap=self.scores.softcap,
                per_layer_sliding_window=softmax.sliding_window,
                prefix=f"{self.layer_name}.kept_{i}",
            )
            for i in range(len(self.plan.full) // at_once)
        )
        # Replaced by the pages (`bind_kv_cache`).
        self.kv_cache = tuple(torch.tensor([]) for _ in self.get_state_shape())

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return page_shapes(self.linearized_config, self.dtype)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return torch.float32, self.dtype

    @property
    def mamba_type(self) -> Any:
        return MambaAttentionBackendEnum.LINEAR

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """q [T, H D], k and v [T, Hk D] → [T, H D]."""
        output = query.new_empty(query.shape)
        torch.ops.vllm.lolcats_attention(query, key, value, output, self.layer_name)
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`forward` outside of compiled graphs."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures its memory
            return torch.zeros_like(query)
        groups, config = self.plan.groups, self.linearized_config
        q, k, v = (x.reshape(1, len(x), -1, head_dim(config)) for x in (query, key, value))
        found = metadata[self.layer_name]
        batch = Batch(
            found.num_decodes,
            found.num_prefills,
            found.query_start_loc,
            found.seq_lens,
            found.state_indices_tensor,
        )
        operands = [part_operands(config, part, self.feature_maps, self.scores, q.device) for part in self.plan.parts]
        outputs = run_step(self.plan, self.layout, operands, self.kv_cache, batch, q, k, v)
        parts = [(part.members, y) for part, y in zip(self.plan.parts, outputs, strict=True)]
        at_once = heads_at_once(config)
        for i, attention in enumerate(self.kept):
            members = self.plan.full[i * at_once : (i + 1) * at_once]
            taken = (groups.take(x, members).flatten(2)[0].contiguous() for x in (q, k, v))
            parts.append((members, attention(*taken).view(1, len(query), -1, head_dim(config))))
        return groups.join(*parts).flatten(2)[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    layer = get_forward_context().no_compile_layers[layer_name]
    output.copy_(layer.attend(query, key, value))


def _shapes_alone(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    return


direct_register_custom_op("lolcats_attention", _attend, mutates_args=["output"], fake_impl=_shapes_alone)
