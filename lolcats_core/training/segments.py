"""The loss of long rows in bounded memory: rows by segments with the state passed on.

# B batch, T tokens
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lolcats_common.errors import UserError
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.forward_context import HybridContext, document_numbers
from lolcats_core.model.transformers_versions import CACHE
from lolcats_core.training.losses import plain_model, summed_loss
from lolcats_core.training.perplexity import next_token_targets


def offloaded() -> AbstractContextManager[Any]:
    """Under it a forward pass keeps what the backward pass needs in the machine's memory.

    Parameters stay where they are: the device holds them anyway.
    """

    def pack(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        owner = saved if saved._base is None else saved._base
        return saved if isinstance(owner, nn.Parameter) else (saved.device, _to_host(saved))

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _to_host(tensor: Tensor) -> Tensor:
    on_gpu = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu).copy_(tensor, non_blocking=on_gpu)


def segmented_loss(model: nn.Module, batch: dict[str, Tensor], length: int, scale: float | None) -> Tensor:
    """Mean next-token cross-entropy of rows taken `length` tokens at a time, each segment on the state of those before.

    With `scale`, adds the gradients of `scale` times the loss: exact inside a segment, while none pass through the
    state. Memory is that of one segment.

    Raises:
        UserError: packed documents, which have no single state.
    """
    places = batch.get("position_ids")
    if document_numbers(places) is not None:
        raise UserError("`finetune.segment_length` must be null with `data.packing: documents`, got " + str(length))
    student = plain_model(model)
    ids = batch["input_ids"]
    targets, counted = next_token_targets(batch)
    count = counted.sum().clamp(min=1)
    cache, total = HybridCache(student.config), torch.zeros((), device=ids.device)
    for start in range(0, ids.shape[1], length):
        stop = min(start + length, ids.shape[1])
        predicts = slice(start, min(stop, targets.shape[1]))
        with torch.set_grad_enabled(scale is not None):
            positions = torch.arange(start, stop, device=ids.device)[None] if places is None else places[:, start:stop]
            context = HybridContext(cache=cache, past_length=start)
            out = student.base_model(
                input_ids=ids[:, start:stop],
                position_ids=positions,
                use_cache=True,
                hybrid=context,
                **{CACHE: cache},
            )
            hidden = out.last_hidden_state[:, : predicts.stop - start]
            if hidden.shape[1]:
                loss = summed_loss(student, hidden, targets[:, predicts], counted[:, predicts]) / count
                if scale is not None:
                    (loss * scale).backward()
                total = total + loss.detach()
        cache.detach()
    return total
